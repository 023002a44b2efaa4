//! Certificates that are revoked while connections are open.

use super::*;
use cairn_identity::{RevocationCounts, Revocations, Trust};
use rcgen::{CertificateRevocationListParams, Issuer, KeyIdMethod, KeyPair, RevokedCertParams, SerialNumber};
use std::fs;
use std::path::PathBuf;
use std::time::SystemTime;
use tokio::time::timeout;

/// A CA that revokes, and who follows its list.
struct Scene {
    ca: Ca,
    path: PathBuf,
    trust: Arc<Trust>,
    _following: JoinHandle<()>,
}

impl Scene {
    fn new() -> Self {
        let ca = Ca::new("cluster.local");
        let path = ca._dir.path().join("crl.pem");
        let revocations = Revocations::open(&path).unwrap();
        let trust = Arc::new(Trust::new(Some(Arc::clone(&revocations))));
        Self { ca, path, trust, _following: tokio::spawn(revocations.follow()) }
    }

    async fn certificate(&self, name: &str) -> Arc<WorkloadCertificate> {
        let trust = Arc::clone(&self.trust);
        let identity = identity(name);
        let made = WorkloadCertificate::request_with(&self.ca.authority, &identity, DAY, trust);
        Arc::new(made.await.unwrap())
    }

    fn revoke(&self, certificates: &[&WorkloadCertificate]) {
        let read = |name| fs::read_to_string(self.ca._dir.path().join(name)).unwrap();
        let key = KeyPair::from_pem(&read("root-key.pem")).unwrap();
        let issuer = Issuer::from_ca_cert_pem(&read("root-cert.pem"), key).unwrap();
        let now = SystemTime::now();
        let revoked = |certificate: &&WorkloadCertificate| RevokedCertParams {
            serial_number: SerialNumber::from_slice(
                &u128::from_str_radix(&certificate.serial, 16).unwrap().to_be_bytes(),
            ),
            revocation_time: now.into(),
            reason_code: None,
            invalidity_date: None,
        };
        let list = CertificateRevocationListParams {
            this_update: now.into(),
            next_update: (now + DAY).into(),
            crl_number: SerialNumber::from(1_u64),
            issuing_distribution_point: None,
            revoked_certs: certificates.iter().map(revoked).collect(),
            key_identifier_method: KeyIdMethod::Sha256,
        };
        let new = self.path.with_extension("new");
        fs::write(&new, list.signed_by(&issuer).unwrap().pem().unwrap()).unwrap();
        fs::rename(new, &self.path).unwrap();
    }

    fn counts(&self) -> RevocationCounts {
        self.trust.revocations().unwrap().counts()
    }
}

#[tokio::test]
async fn a_client_that_is_revoked_is_cut_and_its_session_does_not_bring_it_back() {
    let scene = Scene::new();
    let (client, other) = (scene.certificate("client").await, scene.certificate("other").await);
    let own = scene.certificate("server").await;
    let (told_sender, mut told) = mpsc::unbounded_channel();
    let (_, never) = drain();
    let mut server = Server::start(
        &own,
        ServerSettings::default(),
        move |_| never.clone(),
        move |connect| {
            let told = told_sender.clone();
            tokio::spawn(async move {
                let who = connect.downstream().identity.clone();
                let stream = connect.accept(HeaderMap::new()).unwrap();
                let revocation = stream.revocation().clone();
                tokio::select! {
                    biased;
                    () = revocation.revoked() => told.send(who).unwrap(),
                    () = echo(stream) => {}
                }
            });
        },
    );
    let pool = Pool::new(PoolSettings::default());
    let (to, of_other) =
        (target(&client, server.address, &own.identity), target(&other, server.address, &own.identity));
    let mut open = pool.connect(&to, HeaderMap::new()).await.unwrap();
    let mut kept = pool.connect(&of_other, HeaderMap::new()).await.unwrap();
    expect_echo(&mut open, "before").await;
    expect_echo(&mut kept, "before").await;
    scene.revoke(&[&client]);
    let cut = timeout(LONG, open.read_u8()).await.unwrap();
    assert!(cut.is_err(), "{cut:?}");
    assert!(matches!(timeout(LONG, server.ended.recv()).await.unwrap().unwrap(), Err(ServeError::Revoked)));
    assert_eq!(told.recv().await.unwrap(), client.identity, "its tunnel knows why it ended");
    assert_eq!((scene.counts().clients_refused, scene.counts().servers_refused), (1, 0));
    // It has a session to resume, which was good before.
    let error = pool.connect(&to, HeaderMap::new()).await.err().unwrap();
    assert!(matches!(error, ConnectError::Tls(_) | ConnectError::Http2(_)), "{error:?}");
    assert!(matches!(
        timeout(LONG, server.ended.recv()).await.unwrap().unwrap(),
        Err(ServeError::NotBelieved)
    ));
    // And one that has not is refused in the handshake.
    let anew = scene.certificate("client").await;
    scene.revoke(&[&client, &anew]);
    let both = async {
        while scene.counts().certificates < 2 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(LONG, both).await.unwrap();
    let error = pool.connect(&target(&anew, server.address, &own.identity), HeaderMap::new()).await.err();
    assert!(matches!(error, Some(ConnectError::Tls(_) | ConnectError::Http2(_))), "{error:?}");
    assert!(matches!(timeout(LONG, server.ended.recv()).await.unwrap().unwrap(), Err(ServeError::Tls(_))));
    expect_echo(&mut kept, "who is not named goes on").await;
    assert!(told.try_recv().is_err());
}

#[tokio::test]
async fn a_server_that_is_revoked_is_left_and_not_returned_to() {
    let scene = Scene::new();
    let (client, own) = (scene.certificate("client").await, scene.certificate("server").await);
    let mut server = Server::echo(&own);
    let pool = Pool::new(PoolSettings::default());
    let to = target(&client, server.address, &own.identity);
    let mut open = pool.connect(&to, HeaderMap::new()).await.unwrap();
    expect_echo(&mut open, "before").await;
    let revocation = open.revocation().clone();
    scene.revoke(&[&own]);
    timeout(LONG, revocation.revoked()).await.unwrap();
    assert!(timeout(LONG, open.read_u8()).await.unwrap().is_err());
    assert_eq!(pool.connection_count(), 0);
    drop(server.ended.recv().await);
    assert_eq!(scene.counts().servers_refused, 1);
    let error = pool.connect(&to, HeaderMap::new()).await.err().unwrap();
    assert!(matches!(error, ConnectError::Revoked), "a session resumed: {error:?}");
    let other = scene.certificate("other").await;
    let error = pool.connect(&target(&other, server.address, &own.identity), HeaderMap::new()).await.err();
    assert!(matches!(error, Some(ConnectError::Tls(_))), "{error:?}");
    assert!(pool.shared_is_empty());
}
