//! What istio-cni says, packet by packet, and what is answered.

use cairn_net::{Namespace, Packet};
use cairn_proto::zds::workload_request::Payload;
use cairn_proto::zds::{Ack, Version, WorkloadRequest, WorkloadResponse, ZdsHello, workload_response};
use prost::Message as _;
use std::sync::Arc;

/// The longest reason in an answer: packets have at most 1,024 bytes.
const REASON_BYTES_MAX: usize = 900;

/// Which pod it is, as Kubernetes names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodName {
    /// Its name.
    pub name: Arc<str>,
    /// Its namespace.
    pub namespace: Arc<str>,
    /// Its service account.
    pub service_account: Arc<str>,
}

/// One message of istio-cni.
#[derive(Debug)]
pub enum Message {
    /// A pod has joined.
    Add {
        /// Its uid.
        uid: Arc<str>,
        /// Its name.
        name: PodName,
        /// Its network namespace.
        namespace: Namespace,
    },
    /// A pod that is served is still there, though its namespace cannot be sent again.
    Keep(Arc<str>),
    /// A pod has left.
    Delete(Arc<str>),
    /// All pods have been named.
    SnapshotSent,
}

/// Why a message is not acted upon. The connection ends with it: what follows would not be understood either.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    /// It cannot be read.
    #[error("failure to read message: {0}")]
    Read(&'static str),
    /// It says nothing that can be done, or came at the wrong time.
    #[error("failure to process message: {0}")]
    Process(&'static str),
}

/// The first packet: we speak the protocol's first version.
pub fn hello() -> Vec<u8> {
    ZdsHello { version: Version::V1.into() }.encode_to_vec()
}

/// The answer to a message: done, or why not.
pub fn answer(done: Result<(), &str>) -> Vec<u8> {
    let reason = done.err().unwrap_or_default();
    let error = reason.get(..reason.floor_char_boundary(REASON_BYTES_MAX)).unwrap_or_default().to_owned();
    WorkloadResponse { payload: Some(workload_response::Payload::Ack(Ack { error })) }.encode_to_vec()
}

/// Reads a packet.
///
/// # Errors
/// When it is not one of the protocol's.
pub fn read(packet: Packet) -> Result<Message, Fault> {
    if packet.is_cut {
        return Err(Fault::Read("the packet is too large"));
    }
    let request = WorkloadRequest::decode(packet.bytes.as_slice());
    let request = request.map_err(|_| Fault::Read("the packet is no WorkloadRequest"))?;
    let mut descriptors = packet.descriptors.into_iter();
    let (descriptor, more) = (descriptors.next(), descriptors.next());
    if more.is_some() {
        return Err(Fault::Read("more than one file descriptor"));
    }
    match (request.payload, descriptor) {
        (None, _) => Err(Fault::Read("nothing that is known")),
        (Some(Payload::Add(add)), Some(descriptor)) => {
            let name = add.workload_info.ok_or(Fault::Process("no workload_info"))?;
            let namespace = Namespace::received(descriptor, &add.uid);
            let name = PodName {
                name: name.name.into(),
                namespace: name.namespace.into(),
                service_account: name.service_account.into(),
            };
            Ok(Message::Add { uid: uid(add.uid)?, name, namespace })
        }
        (Some(Payload::Add(_)), None) => Err(Fault::Read("no network namespace with the pod")),
        (Some(_), Some(_)) => Err(Fault::Read("a file descriptor that nobody expects")),
        (Some(Payload::Keep(keep)), None) => Ok(Message::Keep(uid(keep.uid)?)),
        (Some(Payload::Del(delete)), None) => Ok(Message::Delete(uid(delete.uid)?)),
        (Some(Payload::SnapshotSent(_)), None) => Ok(Message::SnapshotSent),
    }
}

fn uid(text: String) -> Result<Arc<str>, Fault> {
    if text.is_empty() { Err(Fault::Process("no uid")) } else { Ok(text.into()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use cairn_proto::zds::{AddWorkload, DelWorkload, KeepWorkload, SnapshotSent, WorkloadInfo};
    use std::fs::File;

    fn packet(payload: Option<Payload>, descriptor_count: usize) -> Packet {
        let descriptors =
            (0..descriptor_count).map(|_| File::open("/proc/self/ns/net").unwrap().into()).collect();
        Packet { bytes: WorkloadRequest { payload }.encode_to_vec(), descriptors, is_cut: false }
    }

    fn add(uid: &str, is_named: bool) -> Option<Payload> {
        let info = || WorkloadInfo { name: "web".into(), namespace: "a".into(), service_account: "x".into() };
        Some(Payload::Add(AddWorkload { uid: uid.into(), workload_info: is_named.then(info) }))
    }

    fn told(read: Result<Message, Fault>) -> String {
        match read {
            Ok(Message::Add { uid, name, .. }) => format!("add {uid} {}/{}", name.namespace, name.name),
            Ok(Message::Keep(uid)) => format!("keep {uid}"),
            Ok(Message::Delete(uid)) => format!("delete {uid}"),
            Ok(Message::SnapshotSent) => "snapshot".to_owned(),
            Err(fault) => fault.to_string(),
        }
    }

    #[test]
    fn packets_are_read_as_the_protocol_says() {
        let keep = || Some(Payload::Keep(KeepWorkload { uid: "1".into() }));
        let delete = || Some(Payload::Del(DelWorkload { uid: "1".into() }));
        let snapshot = || Some(Payload::SnapshotSent(SnapshotSent {}));
        for (payload, descriptor_count, expected) in [
            (add("1", true), 1, "add 1 a/web"),
            (keep(), 0, "keep 1"),
            (delete(), 0, "delete 1"),
            (snapshot(), 0, "snapshot"),
            (None, 0, "failure to read message: nothing that is known"),
            (add("1", true), 0, "failure to read message: no network namespace with the pod"),
            (add("1", true), 2, "failure to read message: more than one file descriptor"),
            (keep(), 1, "failure to read message: a file descriptor that nobody expects"),
            (delete(), 1, "failure to read message: a file descriptor that nobody expects"),
            (snapshot(), 1, "failure to read message: a file descriptor that nobody expects"),
            (add("1", false), 1, "failure to process message: no workload_info"),
            (add("", true), 1, "failure to process message: no uid"),
        ] {
            assert_eq!(told(read(packet(payload, descriptor_count))), expected);
        }
        let broken = Packet { bytes: vec![0xff; 3], descriptors: Vec::new(), is_cut: false };
        assert_eq!(told(read(broken)), "failure to read message: the packet is no WorkloadRequest");
        let cut = Packet { is_cut: true, ..packet(snapshot(), 0) };
        assert_eq!(told(read(cut)), "failure to read message: the packet is too large");
    }

    #[test]
    fn bytes_are_those_of_the_protocol() {
        assert_eq!(hello(), [8, 1]);
        assert_eq!(answer(Ok(())), [10, 0]);
        assert_eq!(answer(Err("no")), [10, 4, 10, 2, b'n', b'o']);
        assert!(answer(Err(&"é".repeat(1000))).len() <= 1024);
        // Its uid is the second field.
        let delete = Some(Payload::Del(DelWorkload { uid: "u".into() }));
        assert_eq!(packet(delete, 0).bytes, [18, 3, 18, 1, b'u']);
    }
}
