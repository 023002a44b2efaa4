//! Lists made by a CA of the test, in a file, and handshakes by them.

use super::*;
use crate::{Authority, IssueError, Trust, WorkloadCertificate};
use cairn_mesh::Identity;
use rcgen::{CertificateRevocationListParams, Issuer, KeyIdMethod, KeyPair, RevokedCertParams, SerialNumber};
use std::fs;
use tempfile::TempDir;

const HOUR: Duration = Duration::from_secs(60 * 60);

/// A CA, and a place for its lists.
struct Ca {
    authority: Authority,
    dir: TempDir,
}

impl Ca {
    fn new() -> Self {
        Self::named("cluster.local")
    }

    fn named(name: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let authority = Authority::open(dir.path(), name).unwrap();
        Self { authority, dir }
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("crl.pem")
    }

    async fn certificate(&self, trust: &Arc<Trust>) -> Result<WorkloadCertificate, IssueError> {
        let identity = Identity::new("cluster.local", "a", "x").unwrap();
        WorkloadCertificate::request_with(&self.authority, &identity, HOUR, Arc::clone(trust)).await
    }

    /// A list of these serial numbers, in PEM, of which the next is due `next_update` from an hour ago.
    fn list(&self, serials: &[&str], next_update: Duration) -> String {
        let read = |name| fs::read_to_string(self.dir.path().join(name)).unwrap();
        let key = KeyPair::from_pem(&read("root-key.pem")).unwrap();
        let issuer = Issuer::from_ca_cert_pem(&read("root-cert.pem"), key).unwrap();
        let at = SystemTime::now() - HOUR;
        let number = |serial: &str| {
            let bytes = u128::from_str_radix(serial, 16).unwrap().to_be_bytes();
            let zeros = bytes.iter().take_while(|byte| **byte == 0).count();
            SerialNumber::from_slice(&bytes[zeros..])
        };
        let revoked = |serial: &&str| RevokedCertParams {
            serial_number: number(serial),
            revocation_time: at.into(),
            reason_code: None,
            invalidity_date: None,
        };
        let list = CertificateRevocationListParams {
            this_update: at.into(),
            next_update: (at + next_update).into(),
            crl_number: SerialNumber::from(1_u64),
            issuing_distribution_point: None,
            revoked_certs: serials.iter().map(revoked).collect(),
            key_identifier_method: KeyIdMethod::Sha256,
        };
        list.signed_by(&issuer).unwrap().pem().unwrap()
    }
}

/// Whether the verifier of servers takes the certificate of `peer` now.
fn takes(own: &WorkloadCertificate, peer: &WorkloadCertificate) -> Result<(), rustls::Error> {
    own.check_server(&peer.chain_pem)
}

fn chain(certificate: &WorkloadCertificate) -> Vec<CertificateDer<'static>> {
    let all = crate::pem::certificates(&certificate.chain_pem).unwrap();
    all[..1].to_vec()
}

const REVOKED: rustls::Error = rustls::Error::InvalidCertificate(rustls::CertificateError::Revoked);

#[tokio::test]
async fn a_certificate_is_good_until_a_list_of_its_issuer_names_it() {
    let ca = Ca::new();
    let revocations = Revocations::open(ca.path()).unwrap();
    assert_eq!(revocations.counts(), RevocationCounts::default(), "the file may come later");
    let trust = Arc::new(Trust::new(Some(Arc::clone(&revocations))));
    let (own, peer) = (ca.certificate(&trust).await.unwrap(), ca.certificate(&trust).await.unwrap());
    let watch = own.watch_server().unwrap();
    let serial = peer.serial.clone();
    let long = 24 * HOUR;
    for (what, list, is_good) in [
        ("somebody else", ca.list(&["07"], long), true),
        ("it", ca.list(&["07", &serial], long), false),
        ("a newer list gives it back", ca.list(&["07"], long), true),
        ("another issuer's list", Ca::named("elsewhere").list(&[&serial], long), true),
        ("overdue, and still in force", ca.list(&[&serial], HOUR / 2), false),
        ("the second list of the issuer", ca.list(&["07"], long) + &ca.list(&[&serial], long), false),
        ("the first list of the issuer", ca.list(&[&serial], long) + &ca.list(&["07"], long), false),
        ("nobody any more", "\n".to_owned(), true),
    ] {
        // Another file, so that no clock need have moved on for it to be seen.
        fs::write(ca.dir.path().join("new"), list).unwrap();
        fs::rename(ca.dir.path().join("new"), ca.path()).unwrap();
        revocations.look();
        let before = revocations.counts().servers_refused;
        let taken = takes(&own, &peer);
        if is_good {
            assert!(taken.is_ok(), "{what}: {taken:?}");
        } else {
            assert_eq!(taken.unwrap_err(), REVOKED, "{what}");
        }
        assert_eq!(watch.is_revoked(&chain(&peer)), !is_good, "{what}");
        let counted = revocations.counts().servers_refused - before;
        assert_eq!(counted, if is_good { 0 } else { 2 }, "{what}");
        assert_eq!(revocations.counts().failures, 0, "{what}");
    }
}

#[tokio::test]
async fn a_list_that_its_issuer_has_not_signed_lets_nobody_in() {
    let ca = Ca::new();
    // Of the same name, with another key.
    let other = Ca::new();
    fs::write(ca.path(), other.list(&["07"], 24 * HOUR)).unwrap();
    let revocations = Revocations::open(ca.path()).unwrap();
    let trust = Arc::new(Trust::new(Some(Arc::clone(&revocations))));
    let (own, peer) = (ca.certificate(&trust).await.unwrap(), ca.certificate(&trust).await.unwrap());
    assert!(takes(&own, &peer).is_err());
    assert_eq!(revocations.counts().servers_refused, 1);
}

#[tokio::test]
async fn what_cannot_be_read_leaves_the_last_lists_in_force() {
    let ca = Ca::new();
    let trust = Arc::default();
    let peer = ca.certificate(&trust).await.unwrap();
    let good = ca.list(&[&peer.serial], 24 * HOUR);
    fs::write(ca.path(), &good).unwrap();
    let revocations = Revocations::open(ca.path()).unwrap();
    let own = ca.certificate(&Arc::new(Trust::new(Some(Arc::clone(&revocations))))).await.unwrap();
    let cut = good.replace("-----END X509 CRL-----", "");
    let damaged = good.replacen("MI", "AA", 1);
    let certificate = peer.chain_pem.clone();
    for (number, (what, text, kind)) in [
        ("cut short", cut.as_str(), "is not PEM"),
        ("damaged", &damaged, "list 1 of"),
        ("something else", "nothing of the kind", "holds no certificate revocation list"),
        ("certificates", &certificate, "holds no certificate revocation list"),
        ("half a list in DER", "\x30\x05abc", "list 1 of"),
        ("too many", &good.repeat(LISTS_MAX + 1), "more than 256 lists"),
    ]
    .into_iter()
    .enumerate()
    {
        fs::write(ca.path(), text).unwrap();
        revocations.look();
        revocations.look();
        let counts = revocations.counts();
        assert_eq!((counts.lists, counts.certificates), (1, 1), "{what}");
        assert_eq!(counts.failures, number as u64 + 1, "{what}: once for each file");
        assert_eq!(takes(&own, &peer).unwrap_err(), REVOKED, "{what}");
        let error = Revocations::open(ca.path()).unwrap_err();
        assert!(error.to_string().contains(kind), "{what}: {error}");
    }
    fs::write(ca.path(), vec![b' '; BYTES_MAX as usize + 1]).unwrap();
    assert!(matches!(Revocations::open(ca.path()), Err(RevocationError::TooLarge { .. })));
    fs::remove_file(ca.path()).unwrap();
    revocations.look();
    assert_eq!(revocations.counts().lists, 1, "who removes the file gives nothing back");
}

#[tokio::test]
async fn a_file_in_der_behind_links_is_followed() {
    let ca = Ca::new();
    let at = |name: &str| ca.dir.path().join(name);
    let der = |serial| {
        CertificateRevocationListDer::from_pem_slice(ca.list(&[serial], 24 * HOUR).as_bytes()).unwrap()
    };
    // As Kubernetes mounts a ConfigMap: what changes is a link to the directory.
    for (name, serial) in [("one", "07"), ("two", "08")] {
        fs::create_dir(at(name)).unwrap();
        fs::write(at(name).join("list"), &*der(serial)).unwrap();
    }
    std::os::unix::fs::symlink(at("one"), at("data")).unwrap();
    std::os::unix::fs::symlink(at("data").join("list"), at("list")).unwrap();
    let revocations = Revocations::open(at("list")).unwrap();
    tokio::spawn(Arc::clone(&revocations).follow());
    let mut changes = revocations.changes.subscribe();
    std::os::unix::fs::symlink(at("two"), at("new")).unwrap();
    fs::rename(at("new"), at("data")).unwrap();
    tokio::time::timeout(Duration::from_secs(10), changes.changed()).await.expect("a change").unwrap();
    assert_eq!(revocations.counts().certificates, 1);
    assert_eq!(revocations.counts().failures, 0);
}
