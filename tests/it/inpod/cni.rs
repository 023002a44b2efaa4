//! istio-cni's side of the socket: it listens, the ztunnel dials, and every message is answered before the next.

use anyhow::{Context, Result, bail, ensure};
use cairn_proto::zds::workload_request::Payload;
use cairn_proto::zds::{
    AddWorkload, DelWorkload, KeepWorkload, SnapshotSent, Version, WorkloadInfo, WorkloadRequest,
    WorkloadResponse, ZdsHello, workload_response,
};
use prost::Message;
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{
    AddressFamily, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix,
    SocketFlags, SocketType, accept_with, bind, listen, recv, sendmsg, socket_with,
};
use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::time::Duration;

/// How long the ztunnel may take to dial or to answer.
const ANSWER_MAX: Duration = Duration::from_secs(30);

/// The listener of a node's istio-cni.
pub struct Listener(OwnedFd);

/// A ztunnel that has dialled and said hello.
pub struct Connection(OwnedFd);

/// A pod as istio-cni knows it.
pub struct Named<'a> {
    pub uid: &'a str,
    pub namespace: &'a str,
    pub name: &'a str,
    pub service_account: &'a str,
}

impl Listener {
    pub fn bind(path: &Path) -> Result<Self> {
        let socket = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
        bind(&socket, &SocketAddrUnix::new(path)?)?;
        listen(&socket, 8)?;
        set_socket_timeout(&socket, Timeout::Recv, Some(ANSWER_MAX))?;
        Ok(Self(socket))
    }

    /// Waits for a ztunnel, and for what it says first.
    pub fn accept(&self) -> Result<Connection> {
        let socket = accept_with(&self.0, SocketFlags::CLOEXEC).context("no ztunnel dials")?;
        for direction in [Timeout::Recv, Timeout::Send] {
            set_socket_timeout(&socket, direction, Some(ANSWER_MAX))?;
        }
        let connection = Connection(socket);
        let hello = ZdsHello::decode(connection.receive()?.as_slice())?;
        ensure!(hello.version() == Version::V1, "{hello:?}");
        Ok(connection)
    }
}

impl Connection {
    /// A pod has joined; its namespace goes along. Returns the error that the ztunnel answers with, or nothing.
    pub fn add(&self, pod: &Named<'_>, namespace: BorrowedFd<'_>) -> Result<String> {
        let info = WorkloadInfo {
            name: pod.name.into(),
            namespace: pod.namespace.into(),
            service_account: pod.service_account.into(),
        };
        let add = AddWorkload { uid: pod.uid.into(), workload_info: Some(info) };
        self.ask(Payload::Add(add), &[namespace])
    }

    pub fn keep(&self, uid: &str) -> Result<String> {
        self.ask(Payload::Keep(KeepWorkload { uid: uid.into() }), &[])
    }

    pub fn delete(&self, uid: &str) -> Result<String> {
        self.ask(Payload::Del(DelWorkload { uid: uid.into() }), &[])
    }

    pub fn snapshot_sent(&self) -> Result<String> {
        self.ask(Payload::SnapshotSent(SnapshotSent {}), &[])
    }

    /// Says something and waits for its answer.
    pub fn ask(&self, payload: Payload, descriptors: &[BorrowedFd<'_>]) -> Result<String> {
        let packet = WorkloadRequest { payload: Some(payload) }.encode_to_vec();
        let mut room = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
        let mut control = SendAncillaryBuffer::new(&mut room);
        if !descriptors.is_empty() {
            ensure!(control.push(SendAncillaryMessage::ScmRights(descriptors)), "too many descriptors");
        }
        sendmsg(self.0.as_fd(), &[IoSlice::new(&packet)], &mut control, SendFlags::NOSIGNAL)?;
        let answer = WorkloadResponse::decode(self.receive()?.as_slice())?;
        match answer.payload {
            Some(workload_response::Payload::Ack(ack)) => Ok(ack.error),
            None => bail!("an answer without anything"),
        }
    }

    /// Whether the ztunnel has closed the connection.
    pub fn is_closed(&self) -> Result<bool> {
        Ok(self.receive()?.is_empty())
    }

    fn receive(&self) -> Result<Vec<u8>> {
        let mut bytes = [0; 1024];
        let (length, _) = recv(&self.0, &mut bytes, RecvFlags::empty()).context("no answer")?;
        Ok(bytes.get(..length).unwrap_or_default().to_vec())
    }
}
