//! A registry of images, spoken to as the distribution specification says: manifests and blobs, read and written.

use crate::challenge::{Challenge, challenge};
use crate::credentials::Login;
use crate::digest::Digest;
use crate::error::FetchError;
use crate::manifest::ACCEPTED;
use crate::pack::Image;
use crate::source::{Reference, SourceError};
use crate::web::{Answer, Call, Trust, Web, host, resolve};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use http::header::{ACCEPT, AUTHORIZATION, CONTENT_TYPE, LOCATION};
use http::uri::Scheme;
use http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, Uri};
use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use serde::Deserialize;

/// As large as registries let manifests be (distribution-spec, "Pushing manifests").
const MANIFEST_BYTES_MAX: u64 = 4 << 20;

/// An answer with a token.
const TOKEN_BYTES_MAX: u64 = 64 * 1024;

/// The header in which registries say what a tag means.
const CONTENT_DIGEST: HeaderName = HeaderName::from_static("docker-content-digest");

/// What is done in a registry, as its tokens call it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Access {
    Pull,
    Push,
}

/// One piece of work with one repository.
pub(crate) struct Session<'a> {
    web: &'a Web,
    reference: &'a Reference,
    login: Option<&'a Login>,
    access: Access,
    trust: Trust,
    /// `https://host/v2/repository`.
    base: String,
    /// What proved who we are, if it was asked for.
    authorization: Option<HeaderValue>,
}

/// A manifest and the digest it is known by.
pub(crate) struct Found {
    pub(crate) bytes: Bytes,
    pub(crate) digest: Digest,
}

impl<'a> Session<'a> {
    /// Finds out how the registry is spoken to. One that is `insecure` need not prove who it is, and may speak plain HTTP;
    /// one of this machine may do the latter.
    pub(crate) async fn open(
        web: &'a Web,
        reference: &'a Reference,
        login: Option<&'a Login>,
        access: Access,
        insecure: bool,
    ) -> Result<Self, FetchError> {
        let trust = if insecure { Trust::Any } else { Trust::Verified };
        let session = |scheme: &str| {
            let base = format!("{scheme}://{}/v2/{}", reference.server(), reference.repository());
            Self { web, reference, login, access, trust, base, authorization: None }
        };
        if !insecure && !reference.is_local() {
            return Ok(session("https"));
        }
        let mut first = None;
        for scheme in ["https", "http"] {
            let uri = parsed(&format!("{scheme}://{}/v2/", reference.server()), reference)?;
            match web.call(Call::get(uri, trust, MANIFEST_BYTES_MAX)).await {
                // Any answer that a registry may give here is one.
                Ok(answer) if matches!(answer.status.as_u16(), 200 | 401 | 403 | 404) => {
                    return Ok(session(scheme));
                }
                Ok(answer) => _ = first.get_or_insert(refusal(reference.server(), &answer)),
                Err(error) => _ = first.get_or_insert(error),
            }
        }
        Err(first.unwrap_or_else(|| FetchError::Address(reference.registry().to_owned())))
    }

    /// The manifest that the reference names, or the one of a digest.
    pub(crate) async fn manifest(&mut self, pinned: Option<Digest>) -> Result<Found, FetchError> {
        let answer = self.ask_for_manifest(Method::GET, pinned).await?;
        let digest = Digest::of(&answer.body);
        match pinned.or(self.reference.digest()).filter(|wanted| *wanted != digest) {
            Some(wanted) => Err(FetchError::Digest { actual: digest, wanted }),
            None => Ok(Found { bytes: answer.body, digest }),
        }
    }

    /// What the reference means now.
    pub(crate) async fn resolve(&mut self) -> Result<Digest, FetchError> {
        if let Some(digest) = self.reference.digest() {
            return Ok(digest);
        }
        let answer = self.ask_for_manifest(Method::HEAD, None).await?;
        match answer.header(CONTENT_DIGEST).and_then(Digest::parse) {
            Some(digest) => Ok(digest),
            // Not every registry says; then the manifest itself does.
            None => self.manifest(None).await.map(|found| found.digest),
        }
    }

    async fn ask_for_manifest(
        &mut self,
        method: Method,
        pinned: Option<Digest>,
    ) -> Result<Answer, FetchError> {
        let wanted = pinned.map_or_else(|| self.reference.wanted(), |digest| digest.qualified());
        let uri = self.uri(&format!("/manifests/{wanted}"))?;
        let call = Call::get(uri, self.trust, MANIFEST_BYTES_MAX);
        let call = Call { method, ..call }.header(ACCEPT, HeaderValue::from_static(ACCEPTED));
        self.expect(call, &[StatusCode::OK]).await
    }

    /// A blob.
    pub(crate) async fn blob(&mut self, digest: Digest, bytes_max: u64) -> Result<Bytes, FetchError> {
        let uri = self.uri(&format!("/blobs/{}", digest.qualified()))?;
        let answer = self.expect(Call::get(uri, self.trust, bytes_max), &[StatusCode::OK]).await?;
        let body = answer.body;
        // A module may be large, and others have work on this thread.
        let hashed = tokio::task::spawn_blocking(move || (Digest::of(&body), body)).await;
        let (actual, body) = hashed.map_err(|_| FetchError::Image("its digest cannot be told".to_owned()))?;
        if actual == digest { Ok(body) } else { Err(FetchError::Digest { actual, wanted: digest }) }
    }

    /// Brings an image there, and returns its digest.
    pub(crate) async fn push(&mut self, image: &Image) -> Result<Digest, FetchError> {
        for blob in &image.blobs {
            self.push_blob(blob).await?;
        }
        let digest = Digest::of(&image.manifest);
        let at = self.reference.tag().map_or_else(|| self.reference.wanted(), str::to_owned);
        let call = Call {
            method: Method::PUT,
            body: image.manifest.clone(),
            ..Call::get(self.uri(&format!("/manifests/{at}"))?, self.trust, MANIFEST_BYTES_MAX)
        };
        let call = call.header(CONTENT_TYPE, HeaderValue::from_static(image.media_type));
        self.expect(call, &[StatusCode::CREATED, StatusCode::OK, StatusCode::ACCEPTED]).await?;
        Ok(digest)
    }

    async fn push_blob(&mut self, blob: &Bytes) -> Result<(), FetchError> {
        let digest = Digest::of(blob).qualified();
        let uri = self.uri(&format!("/blobs/{digest}"))?;
        let known = Call { method: Method::HEAD, ..Call::get(uri, self.trust, 0) };
        if self.send(known).await?.status == StatusCode::OK {
            return Ok(());
        }
        let uri = self.uri("/blobs/uploads/")?;
        let begin = Call { method: Method::POST, ..Call::get(uri.clone(), self.trust, MANIFEST_BYTES_MAX) };
        let begun = self.expect(begin, &[StatusCode::ACCEPTED]).await?;
        let place = begun.header(LOCATION).and_then(|location| resolve(&uri, location));
        let place = place.filter(|place| place.authority() == uri.authority());
        let place = place.ok_or(FetchError::Redirect("the upload is to go to another server, or nowhere"))?;
        let joint = if place.query().is_some() { '&' } else { '?' };
        let encoded = utf8_percent_encode(&digest, NON_ALPHANUMERIC);
        let uri = parsed(&format!("{place}{joint}digest={encoded}"), self.reference)?;
        let upload = Call {
            method: Method::PUT,
            body: blob.clone(),
            ..Call::get(uri, self.trust, MANIFEST_BYTES_MAX)
        };
        let upload = upload.header(CONTENT_TYPE, HeaderValue::from_static("application/octet-stream"));
        self.expect(upload, &[StatusCode::CREATED, StatusCode::NO_CONTENT]).await.map(drop)
    }

    fn uri(&self, path: &str) -> Result<Uri, FetchError> {
        parsed(&format!("{}{path}", self.base), self.reference)
    }

    async fn expect(&mut self, call: Call, wanted: &[StatusCode]) -> Result<Answer, FetchError> {
        let name = host(&call.uri).to_owned();
        let answer = self.send(call).await?;
        if wanted.contains(&answer.status) { Ok(answer) } else { Err(refusal(&name, &answer)) }
    }

    /// Sends a request, and again with a proof of who we are if the registry asks for one.
    async fn send(&mut self, call: Call) -> Result<Answer, FetchError> {
        let answer = self.web.call(self.authorized(call.clone())).await?;
        if answer.status != StatusCode::UNAUTHORIZED {
            return Ok(answer);
        }
        // A token may have run out on the way; a login that was refused stays so.
        let Some(proof) = self.prove(&answer.headers).await? else { return Ok(answer) };
        if self.authorization.as_ref() == Some(&proof) {
            return Ok(answer);
        }
        self.authorization = Some(proof);
        self.web.call(self.authorized(call)).await
    }

    fn authorized(&self, call: Call) -> Call {
        match &self.authorization {
            Some(value) => call.header(AUTHORIZATION, value.clone()),
            None => call,
        }
    }

    /// What the registry asks for; `None`: what it asks for cannot be given.
    async fn prove(&self, headers: &HeaderMap) -> Result<Option<HeaderValue>, FetchError> {
        if let Some(Login::RegistryToken(token)) = self.login {
            return bearer(token).map(Some);
        }
        match challenge(headers) {
            Some(Challenge::Basic) => self.login.map(basic).transpose(),
            Some(Challenge::Bearer { realm, service, scope }) => {
                let repository = self.reference.repository();
                // The question for a blob would get a token for reading only, and the next one another.
                let scope = match (self.access, scope) {
                    (Access::Pull, Some(scope)) => scope,
                    (Access::Pull, None) => format!("repository:{repository}:pull"),
                    (Access::Push, _) => format!("repository:{repository}:pull,push"),
                };
                let token = self.token(&realm, service.as_deref(), &scope).await?;
                bearer(&token).map(Some)
            }
            None => Ok(None),
        }
    }

    /// Gets a token from where the registry says (distribution's token specification).
    async fn token(&self, realm: &str, service: Option<&str>, scope: &str) -> Result<String, FetchError> {
        let uri = realm
            .parse::<Uri>()
            .ok()
            .filter(|uri| uri.authority().is_some_and(|at| !at.as_str().contains('@')));
        let uri = uri.ok_or(FetchError::Login("it names no place where tokens are given"))?;
        // What the registry had to prove, so does whoever gives its tokens: a password goes there.
        if uri.scheme() != Some(&Scheme::HTTPS) && self.base.starts_with("https:") {
            return Err(FetchError::Login("it wants its tokens to be got without TLS"));
        }
        let encode = |text: &str| utf8_percent_encode(text, NON_ALPHANUMERIC).to_string();
        let mut query = format!("scope={}", encode(scope));
        if let Some(service) = service {
            query = format!("service={}&{query}", encode(service));
        }
        let call = match self.login {
            Some(Login::IdentityToken(token)) => {
                let form = format!(
                    "grant_type=refresh_token&client_id=cairn&refresh_token={}&{query}",
                    encode(token)
                );
                let call = Call::get(uri, self.trust, TOKEN_BYTES_MAX);
                let form_type = HeaderValue::from_static("application/x-www-form-urlencoded");
                Call { method: Method::POST, body: form.into(), ..call }.header(CONTENT_TYPE, form_type)
            }
            login => {
                let joint = if uri.query().is_some() { '&' } else { '?' };
                let call = Call::get(
                    parsed(&format!("{uri}{joint}{query}"), self.reference)?,
                    self.trust,
                    TOKEN_BYTES_MAX,
                );
                match login {
                    Some(login) => call.header(AUTHORIZATION, basic(login)?),
                    None => call,
                }
            }
        };
        let name = host(&call.uri).to_owned();
        let answer = self.web.call(call).await?;
        if answer.status != StatusCode::OK {
            return Err(refusal(&name, &answer));
        }
        let token: Token = serde_json::from_slice(&answer.body)
            .map_err(|_| FetchError::Login("what it says is a token is none"))?;
        token.token.or(token.access_token).ok_or(FetchError::Login("it gave no token"))
    }
}

#[derive(Deserialize)]
struct Token {
    token: Option<String>,
    access_token: Option<String>,
}

fn parsed(uri: &str, reference: &Reference) -> Result<Uri, FetchError> {
    uri.parse().map_err(|_| FetchError::Source(SourceError::Reference(reference.to_string())))
}

fn basic(login: &Login) -> Result<HeaderValue, FetchError> {
    let Login::Password { user, password } = login else {
        return Err(FetchError::Login("it wants a password, and there is only a token"));
    };
    secret(&format!("Basic {}", STANDARD.encode(format!("{user}:{password}"))))
}

fn bearer(token: &str) -> Result<HeaderValue, FetchError> {
    secret(&format!("Bearer {token}"))
}

fn secret(value: &str) -> Result<HeaderValue, FetchError> {
    let mut value =
        HeaderValue::from_str(value).map_err(|_| FetchError::Login("its token cannot be sent"))?;
    value.set_sensitive(true);
    Ok(value)
}

/// Why the registry did not do it, by its own code.
fn refusal(host: &str, answer: &Answer) -> FetchError {
    #[derive(Deserialize)]
    struct Refusal {
        errors: Vec<Reason>,
    }
    #[derive(Deserialize)]
    struct Reason {
        code: String,
    }
    let reasons = serde_json::from_slice::<Refusal>(&answer.body).ok();
    let code = reasons.and_then(|reasons| reasons.errors.into_iter().next()).map(|reason| reason.code);
    // Nothing but such a code: whatever else stands there is not for the eyes of a plugin's author.
    let is_code = |code: &String| {
        code.len() <= 40 && code.bytes().all(|byte| byte.is_ascii_uppercase() || byte == b'_')
    };
    FetchError::Status { host: host.to_owned(), status: answer.status, code: code.filter(is_code) }
}
