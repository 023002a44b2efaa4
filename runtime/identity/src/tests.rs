//! Handshakes between certificates, and the embedded CA behind its gRPC service.

use crate::{
    Authority, AuthorityError, CaClient, CaSettings, ChainError, IssueError, Issuer, SignError, Trust,
    WorkloadCertificate, is_in_force, peer_identity,
};
use cairn_mesh::Identity;
use cairn_proto::ca::istio_certificate_service_server::{
    IstioCertificateService, IstioCertificateServiceServer,
};
use cairn_proto::ca::{IstioCertificateRequest, IstioCertificateResponse};
use parking_lot::Mutex;
use rcgen::{CertificateParams, KeyPair, SanType};
use rustls::{CipherSuite, ClientConfig, HandshakeKind, ProtocolVersion, ServerConfig};
use rustls_pki_types::ServerName;
use std::fs;
use std::future::Future;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, SystemTime};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};
use tokio_rustls::client::TlsStream as ClientStream;
use tokio_rustls::server::TlsStream as ServerStream;
use tokio_rustls::{TlsAcceptor, TlsConnector};
use tonic::{Request, Response, Status};

const HOUR: Duration = Duration::from_secs(60 * 60);

fn id(text: &str) -> Identity {
    text.parse().unwrap()
}

struct Ca {
    authority: Arc<Authority>,
    dir: TempDir,
}

impl Ca {
    /// A CA that signs for every trust domain.
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        drop(Authority::open(dir.path(), "cluster.local").unwrap());
        let (cert, key) = (dir.path().join("root-cert.pem"), dir.path().join("root-key.pem"));
        Self { authority: Arc::new(Authority::from_files(&cert, &key).unwrap()), dir }
    }

    async fn certificate(&self, identity: &str) -> WorkloadCertificate {
        WorkloadCertificate::request(&*self.authority, &id(identity), HOUR).await.unwrap()
    }
}

/// Signs as at another time.
struct AtTime(Arc<Authority>, SystemTime);

impl Issuer for AtTime {
    fn issue(
        &self,
        _: Identity,
        csr_pem: String,
        ttl: Duration,
    ) -> Pin<Box<dyn Future<Output = Result<Vec<String>, IssueError>> + Send>> {
        let signed = self.0.sign(&csr_pem, ttl, self.1).map_err(IssueError::Sign);
        Box::pin(std::future::ready(signed))
    }
}

type Streams = (ClientStream<DuplexStream>, ServerStream<DuplexStream>);

/// A handshake, and one byte from the server: in TLS 1.3 only that tells the client that it was accepted.
async fn handshake(
    client: Arc<ClientConfig>,
    server: Arc<ServerConfig>,
) -> (io::Result<()>, io::Result<Streams>) {
    let (near, far) = duplex(1 << 16);
    let name = ServerName::try_from("127.0.0.1").unwrap();
    let accepting = tokio::spawn(async move {
        let mut stream = TlsAcceptor::from(server).accept(far).await?;
        stream.write_all(b"!").await?;
        stream.flush().await?;
        io::Result::Ok(stream)
    });
    let connected = async {
        let mut stream = TlsConnector::from(client).connect(name, near).await?;
        stream.read_u8().await?;
        io::Result::Ok(stream)
    };
    let (connected, accepted) = (connected.await, accepting.await.unwrap());
    match (connected, accepted) {
        (Ok(client), Ok(server)) => (Ok(()), Ok((client, server))),
        (client, server) => (client.map(drop), Err(server.err().unwrap_or(io::ErrorKind::Other.into()))),
    }
}

const CLIENT: &str = "spiffe://cluster.local/ns/a/sa/client";
const SERVER: &str = "spiffe://cluster.local/ns/b/sa/server";

#[tokio::test]
async fn both_sides_prove_who_they_are() {
    let ca = Ca::new();
    let (client, server) = (ca.certificate(CLIENT).await, ca.certificate(SERVER).await);
    let expected = [id("spiffe://cluster.local/ns/b/sa/other"), id(SERVER)];
    let (_, accepted) = handshake(client.client_config(&expected), server.server_config()).await;
    let (near, far) = accepted.unwrap();
    let (near, far) = (near.get_ref().1, far.get_ref().1);
    assert_eq!(peer_identity(near.peer_certificates().unwrap()), Some(id(SERVER)));
    assert_eq!(peer_identity(far.peer_certificates().unwrap()), Some(id(CLIENT)));
    assert_eq!(far.protocol_version(), Some(ProtocolVersion::TLSv1_3));
    assert_eq!(far.alpn_protocol(), Some(&b"h2"[..]));
    assert_eq!(far.negotiated_cipher_suite().unwrap().suite(), CipherSuite::TLS13_AES_256_GCM_SHA384);
    assert_eq!(far.server_name(), None);
}

#[tokio::test]
async fn who_has_proven_itself_is_in_force_until_its_certificate_is_over() {
    let ca = Ca::new();
    let server = ca.certificate(SERVER).await;
    let ttl = Duration::from_secs(6);
    let client = WorkloadCertificate::request(&*ca.authority, &id(CLIENT), ttl).await.unwrap();
    let (_, accepted) = handshake(client.client_config(&[id(SERVER)]), server.server_config()).await;
    let (_near, far) = accepted.unwrap();
    let chain = far.get_ref().1.peer_certificates().unwrap();
    assert!(is_in_force(chain) && !is_in_force(&[]));
    tokio::time::sleep(Duration::from_secs(8)).await;
    assert!(!is_in_force(chain));
}

#[tokio::test]
async fn a_session_is_resumed_by_whom_it_was_made_with_only() {
    let ca = Ca::new();
    let (client, server) = (ca.certificate(CLIENT).await, ca.certificate(SERVER).await);
    let expected = [id(SERVER)];
    let kind = async |client: &WorkloadCertificate, expected: &[Identity], server: &WorkloadCertificate| {
        let (_, accepted) = handshake(client.client_config(expected), server.server_config()).await;
        let (near, far) = accepted.unwrap();
        let (near, far) = (near.get_ref().1, far.get_ref().1);
        assert_eq!(peer_identity(near.peer_certificates().unwrap()), Some(id(SERVER)));
        assert_eq!(peer_identity(far.peer_certificates().unwrap()), Some(client.identity.clone()));
        (near.handshake_kind().unwrap(), far.handshake_kind().unwrap())
    };
    let (full, resumed) =
        ((HandshakeKind::Full, HandshakeKind::Full), (HandshakeKind::Resumed, HandshakeKind::Resumed));
    assert_eq!(kind(&client, &expected, &server).await, full);
    assert_eq!(kind(&client, &expected, &server).await, resumed, "and the identities are still known");
    assert_eq!(kind(&client, &expected, &server).await, resumed, "each session brings the next");
    let wider = [id(SERVER), id("spiffe://cluster.local/ns/b/sa/other")];
    assert_eq!(kind(&client, &wider, &server).await, full, "another expectation");
    let other = ca.certificate("spiffe://cluster.local/ns/a/sa/other").await;
    assert_eq!(kind(&other, &expected, &server).await, full, "another client");
    let renewed = ca.certificate(SERVER).await;
    assert_eq!(kind(&client, &expected, &renewed).await, full, "another certificate of the server");
    let renewed = ca.certificate(CLIENT).await;
    assert_eq!(kind(&renewed, &expected, &server).await, full, "another certificate of the client");
}

#[tokio::test]
async fn wrong_peers_are_refused() {
    let (ca, other_ca) = (Ca::new(), Ca::new());
    let long_ago = AtTime(Arc::clone(&ca.authority), SystemTime::now() - 2 * HOUR);
    let expired = |identity| WorkloadCertificate::request(&long_ago, identity, HOUR);
    let (client, server) = (id(CLIENT), id(SERVER));
    let client_of = |certificate: WorkloadCertificate, expected: &Identity| {
        certificate.client_config(std::slice::from_ref(expected))
    };
    let good_client = client_of(ca.certificate(CLIENT).await, &server);
    let good_server = ca.certificate(SERVER).await.server_config();
    let stranger = "spiffe://elsewhere/ns/a/sa/client";
    for (name, client, server) in [
        ("server is someone else", client_of(ca.certificate(CLIENT).await, &client), good_server.clone()),
        (
            "server's trust domain is another",
            good_client.clone(),
            ca.certificate("spiffe://elsewhere/ns/b/sa/server").await.server_config(),
        ),
        ("nobody is expected", ca.certificate(CLIENT).await.client_config(&[]), good_server.clone()),
        ("server has expired", good_client.clone(), expired(&server).await.unwrap().server_config()),
        ("server is of another CA", good_client.clone(), other_ca.certificate(SERVER).await.server_config()),
        (
            "client's trust domain is another",
            client_of(ca.certificate(stranger).await, &server),
            good_server.clone(),
        ),
        ("client has expired", client_of(expired(&client).await.unwrap(), &server), good_server.clone()),
        (
            "client is of another CA",
            client_of(other_ca.certificate(CLIENT).await, &server),
            good_server.clone(),
        ),
        ("client shows no certificate", anonymous(&ca), good_server.clone()),
    ] {
        let (connected, accepted) = handshake(client, server).await;
        assert!(connected.is_err() && accepted.is_err(), "{name}");
    }
    let (connected, accepted) = handshake(good_client, good_server).await;
    assert!(connected.is_ok() && accepted.is_ok());
}

/// A client that trusts everyone of the CA by name and has no certificate.
fn anonymous(ca: &Ca) -> Arc<ClientConfig> {
    let mut roots = rustls::RootCertStore::empty();
    for root in crate::pem::certificates(ca.authority.roots_pem()).unwrap() {
        roots.add(root).unwrap();
    }
    let provider = Arc::clone(&crate::certificate::PROVIDER);
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = vec![b"h2".to_vec()];
    Arc::new(config)
}

#[tokio::test]
async fn client_configurations_are_built_once() {
    let ca = Ca::new();
    let certificate = ca.certificate(CLIENT).await;
    let expected = [id(SERVER)];
    assert!(Arc::ptr_eq(&certificate.client_config(&expected), &certificate.client_config(&expected)));
    assert!(!Arc::ptr_eq(&certificate.client_config(&expected), &certificate.client_config(&[])));
}

#[tokio::test]
async fn certificate_for_someone_else_is_not_ours() {
    /// Signs everything for the same identity.
    struct Confused(Ca);
    impl Issuer for Confused {
        fn issue(
            &self,
            _: Identity,
            _: String,
            ttl: Duration,
        ) -> Pin<Box<dyn Future<Output = Result<Vec<String>, IssueError>> + Send>> {
            let csr = csr(&[SanType::URI(SERVER.try_into().unwrap())]);
            Box::pin(std::future::ready(Ok(self.0.authority.sign(&csr, ttl, SystemTime::now()).unwrap())))
        }
    }
    let confused = Confused(Ca::new());
    let error = WorkloadCertificate::request(&confused, &id(CLIENT), HOUR).await.unwrap_err();
    assert!(matches!(error, IssueError::Chain(ChainError::Identity { .. })), "{error:?}");
    let error = WorkloadCertificate::request(&confused, &id(SERVER), HOUR).await.unwrap_err();
    assert!(matches!(error, IssueError::Chain(ChainError::Tls(_))), "another key: {error:?}");
}

fn csr(names: &[SanType]) -> String {
    let mut params = CertificateParams::default();
    params.subject_alt_names = names.to_vec();
    params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    params.serialize_request(&KeyPair::generate().unwrap()).unwrap().pem().unwrap()
}

#[test]
fn request_must_name_one_workload_of_our_trust_domain() {
    let dir = tempfile::tempdir().unwrap();
    let authority = Authority::open(dir.path(), "cluster.local").unwrap();
    let uri = |text: &str| SanType::URI(text.try_into().unwrap());
    let dns = SanType::DnsName("server".try_into().unwrap());
    let sign = |names: &[SanType]| authority.sign(&csr(names), HOUR, SystemTime::now());
    assert!(sign(&[uri(CLIENT)]).is_ok());
    assert!(matches!(sign(&[]), Err(SignError::Names)));
    assert!(matches!(sign(std::slice::from_ref(&dns)), Err(SignError::Names)));
    assert!(matches!(sign(&[uri(CLIENT), dns]), Err(SignError::Names)));
    assert!(matches!(sign(&[uri(CLIENT), uri(SERVER)]), Err(SignError::Names)));
    assert!(matches!(sign(&[uri("https://server")]), Err(SignError::Identity(_))));
    let elsewhere = sign(&[uri("spiffe://elsewhere/ns/a/sa/client")]);
    assert!(matches!(elsewhere, Err(SignError::TrustDomain { .. })));
    assert!(matches!(authority.sign("nonsense", HOUR, SystemTime::now()), Err(SignError::Request(_))));
    assert_eq!(Authority::csr_identity(&csr(&[uri(CLIENT)])).unwrap(), id(CLIENT));
}

#[test]
fn request_is_read_only_for_key_and_name() {
    let ca = Ca::new();
    let now = SystemTime::now();
    let request = csr(&[SanType::URI(CLIENT.try_into().unwrap())]);
    let chain = ca.authority.sign(&request, HOUR * 1000, now).unwrap();
    assert_eq!(chain.len(), 2);
    assert_eq!(chain[1], ca.authority.roots_pem());
    let leaf = crate::pem::certificates(&chain[0]).unwrap().remove(0);
    let (_, leaf) = x509_parser::parse_x509_certificate(&leaf).unwrap();
    assert!(!leaf.is_ca(), "the request asked to be a CA");
    assert_eq!(leaf.subject().iter().count(), 0);
    let life = leaf.validity().not_after.timestamp() - leaf.validity().not_before.timestamp();
    assert_eq!(life, 24 * 60 * 60 + 60);
    let other = ca.authority.sign(&request, HOUR, now).unwrap();
    let other = crate::pem::certificates(&other[0]).unwrap().remove(0);
    let (_, other) = x509_parser::parse_x509_certificate(&other).unwrap();
    assert_ne!(leaf.raw_serial(), other.raw_serial(), "serial numbers never repeat");
}

#[test]
fn authority_is_kept_in_its_directory() {
    let parent = tempfile::tempdir().unwrap();
    let dir = parent.path().join("ca");
    let roots = Authority::open(&dir, "cluster.local").unwrap().roots_pem().to_owned();
    assert_eq!(Authority::open(&dir, "cluster.local").unwrap().roots_pem(), roots);
    let mode = |path: PathBuf| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(dir.clone()), 0o700);
    assert_eq!(mode(dir.join("root-key.pem")), 0o600);

    let (cert, key) = (dir.join("root-cert.pem"), dir.join("root-key.pem"));
    fs::write(&key, KeyPair::generate().unwrap().serialize_pem()).unwrap();
    let other_key = Authority::from_files(&cert, &key).err().unwrap();
    assert!(matches!(other_key, AuthorityError::KeyMismatch), "{other_key}");
    let own = rcgen::generate_simple_self_signed(vec!["server".to_owned()]).unwrap();
    fs::write(&cert, own.cert.pem()).unwrap();
    let no_authority = Authority::from_files(&cert, &key).err().unwrap();
    assert!(matches!(no_authority, AuthorityError::NotAnAuthority), "{no_authority}");
    fs::remove_file(&key).unwrap();
    assert!(
        matches!(Authority::from_files(&cert, &key), Err(AuthorityError::File { path, .. }) if path == key)
    );
}

#[tokio::test]
async fn authority_below_another_sends_its_whole_chain() {
    let ca = Ca::new();
    let root_key =
        KeyPair::from_pem(&fs::read_to_string(ca.dir.path().join("root-key.pem")).unwrap()).unwrap();
    // The root made by `open` allows no CA below it, so this one is made here.
    let mut params = CertificateParams::default();
    params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Constrained(1));
    let root = rcgen::CertifiedIssuer::self_signed(params, root_key).unwrap();
    let middle_key = KeyPair::generate().unwrap();
    let mut params = CertificateParams::default();
    params.distinguished_name.push(rcgen::DnType::CommonName, "middle");
    params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Constrained(0));
    let middle = params.signed_by(&middle_key, &root).unwrap();
    let (cert, key) = (ca.dir.path().join("cert.pem"), ca.dir.path().join("key.pem"));
    fs::write(&cert, middle.pem() + &root.pem()).unwrap();
    fs::write(&key, middle_key.serialize_pem()).unwrap();
    let authority = Authority::from_files(&cert, &key).unwrap();
    let client = WorkloadCertificate::request(&authority, &id(CLIENT), HOUR).await.unwrap();
    let server = WorkloadCertificate::request(&authority, &id(SERVER), HOUR).await.unwrap();
    let (connected, accepted) = handshake(client.client_config(&[id(SERVER)]), server.server_config()).await;
    connected.unwrap();
    assert_eq!(accepted.unwrap().1.get_ref().1.peer_certificates().unwrap().len(), 2);
}

/// The gRPC service in front of an [`Authority`]; remembers the requests.
#[derive(Clone)]
struct Service {
    authority: Arc<Authority>,
    seen: Arc<Mutex<Vec<Seen>>>,
}

#[derive(Debug, PartialEq)]
struct Seen {
    authorization: String,
    cluster_id: String,
    seconds: i64,
    impersonated: Option<prost_types::value::Kind>,
}

#[tonic::async_trait]
impl IstioCertificateService for Service {
    async fn create_certificate(
        &self,
        request: Request<IstioCertificateRequest>,
    ) -> Result<Response<IstioCertificateResponse>, Status> {
        let header = |name| {
            let value = request.metadata().get(name).map(|value| value.to_str().unwrap());
            value.unwrap_or_default().to_owned()
        };
        let (authorization, cluster_id) = (header("authorization"), header("clusterid"));
        if authorization.ends_with("wrong") {
            return Err(Status::unauthenticated("who are you?"));
        }
        let request = request.get_ref();
        let fields = request.metadata.as_ref().map(|metadata| &metadata.fields);
        let impersonated = fields.and_then(|fields| fields.get("ImpersonatedIdentity")).cloned();
        self.seen.lock().push(Seen {
            authorization,
            cluster_id,
            seconds: request.validity_duration,
            impersonated: impersonated.and_then(|value| value.kind),
        });
        let ttl = Duration::from_secs(request.validity_duration as u64);
        let cert_chain = self.authority.sign(&request.csr, ttl, SystemTime::now()).unwrap();
        Ok(Response::new(IstioCertificateResponse { cert_chain }))
    }
}

#[tokio::test]
async fn ca_client_reads_roots_and_token_again_at_each_call() {
    let ca = Ca::new();
    let service = Service { authority: Arc::clone(&ca.authority), seen: Arc::default() };
    let address = serve(&ca.authority, service.clone()).await;
    let (roots, token) = (ca.dir.path().join("roots.pem"), ca.dir.path().join("token"));
    let client = CaClient::new(CaSettings {
        address: format!("https://{address}"),
        roots: roots.clone().into(),
        token: Some(token.clone().into()),
        host: None,
        headers: Vec::new(),
        cluster_id: "Kubernetes".to_owned(),
        impersonate: true,
    });
    let identity = id(CLIENT);
    let request = || WorkloadCertificate::request(&client, &identity, HOUR);

    let no_token = request().await.unwrap_err();
    assert!(matches!(&no_token, IssueError::File { path, .. } if *path == token), "{no_token}");
    fs::write(&token, "wrong").unwrap();
    let no_roots = request().await.unwrap_err();
    assert!(matches!(&no_roots, IssueError::File { path, .. } if *path == roots), "{no_roots}");
    fs::write(&roots, Ca::new().authority.roots_pem()).unwrap();
    let other_roots = request().await.unwrap_err();
    assert!(
        matches!(&other_roots, IssueError::Refused(status) if status.code() == tonic::Code::Unavailable),
        "{other_roots:?}"
    );
    fs::write(&roots, ca.authority.roots_pem()).unwrap();
    let wrong_token = request().await.unwrap_err();
    assert!(
        matches!(&wrong_token, IssueError::Refused(status) if status.code() == tonic::Code::Unauthenticated)
    );
    fs::write(&token, "right\n").unwrap();
    let certificate = request().await.unwrap();
    assert_eq!(certificate.identity, identity);
    assert!(certificate.chain_pem.ends_with(ca.authority.roots_pem()));
    let expected = Seen {
        authorization: "Bearer right".to_owned(),
        cluster_id: "Kubernetes".to_owned(),
        seconds: 3600,
        impersonated: Some(prost_types::value::Kind::StringValue(CLIENT.to_owned())),
    };
    assert_eq!(*service.seen.lock(), [expected]);
}

async fn serve(authority: &Authority, service: Service) -> std::net::SocketAddr {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let tls = TlsAcceptor::from(authority.server_tls(&["127.0.0.1".to_owned()]).unwrap());
    let (sender, receiver) = tokio::sync::mpsc::channel::<io::Result<_>>(8);
    tokio::spawn(async move {
        loop {
            let (tcp, _) = listener.accept().await.unwrap();
            // One that does not trust us goes away.
            if let Ok(stream) = tls.accept(tcp).await {
                sender.send(Ok(stream)).await.unwrap();
            }
        }
    });
    let incoming = tokio_stream::wrappers::ReceiverStream::new(receiver);
    let server = tonic::transport::Server::builder().add_service(IstioCertificateServiceServer::new(service));
    tokio::spawn(server.serve_with_incoming(incoming));
    address
}

#[tokio::test]
async fn an_alias_of_our_trust_domain_is_our_trust_domain() {
    let ca = Ca::new();
    let trust = Arc::new(Trust::default());
    let certificate = |identity: &'static str, trust: Arc<Trust>| {
        let authority = Arc::clone(&ca.authority);
        async move {
            let identity = id(identity);
            WorkloadCertificate::request_with(&*authority, &identity, HOUR, trust).await.unwrap()
        }
    };
    let own = certificate(SERVER, Arc::clone(&trust)).await;
    let old = certificate("spiffe://old/ns/a/sa/client", Arc::default()).await;
    let old_server = certificate("spiffe://old/ns/b/sa/server", Arc::default()).await;
    let client = certificate(CLIENT, Arc::clone(&trust)).await;
    // Whoever has the old name thinks nothing of the new one; it is asked for by its own here.
    let connect = async || handshake(old.client_config(&[id(SERVER)]), own.server_config()).await.1.is_ok();
    let reach = async || {
        // The server takes any client of its own trust domain.
        let (connected, _) = handshake(client.client_config(&[id(SERVER)]), old_server.server_config()).await;
        format!("{connected:?}")
    };
    assert!(!connect().await && !own.welcomes(&old.identity));
    assert!(reach().await.contains("WrongPeer"), "{}", reach().await);
    trust.set_aliases(["old".into()]);
    assert!(connect().await && own.welcomes(&old.identity));
    // The server is believed; it does not believe us.
    assert!(!reach().await.contains("WrongPeer"), "{}", reach().await);
}
