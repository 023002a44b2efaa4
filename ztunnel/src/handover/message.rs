//! What a predecessor and its successor say to each other: one packet of JSON each.

use super::sockets::SocketName;
use super::{HandoverError, STEP_MAX};
use cairn_net::{Packet, PacketSocket};
use serde::{Deserialize, Serialize};
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

/// The version of everything but [`Message::Hello`], which stays as it is for ever: it may only gain fields that older
/// releases ignore.
pub const VERSION: u32 = 1;

/// A message. The largest is a [`Message::Socket`], of some 700 bytes when all names are as long as Kubernetes lets;
/// packets end at 1,024.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "kebab-case")]
pub enum Message {
    /// The successor is there.
    Hello {
        /// The versions that it speaks.
        versions: Vec<u32>,
        /// Its release, for logs.
        release: String,
        /// Its own network namespace.
        network: String,
    },
    /// The predecessor will hand over.
    Welcome {
        /// The version to speak.
        version: u32,
        /// Its release, for logs.
        release: String,
        /// Its own network namespace.
        network: String,
    },
    /// The predecessor will not, and why.
    Refused {
        /// Why.
        reason: String,
    },
    /// The successor wants the sockets now.
    Take,
    /// One of them; its descriptor comes with the packet.
    Socket(SocketName),
    /// Those were all.
    End {
        /// How many.
        count: usize,
    },
    /// The successor serves every pod.
    Serving,
    /// The predecessor accepts no more.
    Stopped,
}

/// Reads a packet, and the descriptor that came with it.
pub fn read(packet: Packet) -> Result<(Message, Option<OwnedFd>), HandoverError> {
    if packet.is_cut {
        return Err(HandoverError::Unexpected("a packet that is cut off".to_owned()));
    }
    let message = serde_json::from_slice(&packet.bytes)
        .map_err(|error| HandoverError::Unexpected(format!("a packet that cannot be read: {error}")))?;
    let mut descriptors = packet.descriptors.into_iter();
    Ok((message, descriptors.next()))
}

/// Waits for a message.
pub async fn receive(
    socket: &PacketSocket,
    limit: Duration,
) -> Result<(Message, Option<OwnedFd>), HandoverError> {
    let packet = tokio::time::timeout(limit, socket.receive()).await;
    let packet = packet.map_err(|_| HandoverError::Silent(limit))??;
    read(packet.ok_or(HandoverError::Closed)?)
}

/// Says something.
pub async fn send(socket: &PacketSocket, message: &Message) -> Result<(), HandoverError> {
    within(socket.send(&written(message)?)).await
}

/// Hands over a socket.
pub async fn send_socket(
    socket: &PacketSocket,
    name: SocketName,
    descriptor: &OwnedFd,
) -> Result<(), HandoverError> {
    within(socket.send_with(&written(&Message::Socket(name))?, descriptor.as_fd())).await
}

fn written(message: &Message) -> Result<Vec<u8>, HandoverError> {
    serde_json::to_vec(message).map_err(|error| HandoverError::Unexpected(error.to_string()))
}

async fn within(sent: impl Future<Output = Result<(), cairn_net::PacketError>>) -> Result<(), HandoverError> {
    match tokio::time::timeout(STEP_MAX, sent).await {
        Ok(sent) => Ok(sent?),
        Err(_) => Err(HandoverError::Silent(STEP_MAX)),
    }
}

#[cfg(test)]
mod tests {
    use super::super::sockets::Transport;
    use super::*;

    fn packet(text: &str) -> Packet {
        Packet { bytes: text.into(), descriptors: Vec::new(), is_cut: false }
    }

    /// The first packet is understood by every release there will be, so its text is fixed here.
    #[test]
    fn a_hello_is_read_as_it_was_first_written_and_with_more() {
        let expected =
            Message::Hello { versions: vec![1], release: "0.1.0".into(), network: "4:4026531840".into() };
        let text = r#"{"type":"hello","versions":[1],"release":"0.1.0","network":"4:4026531840"}"#;
        assert_eq!(String::from_utf8(written(&expected).unwrap()).unwrap(), text);
        let more =
            r#"{"type":"hello","versions":[1],"release":"0.1.0","network":"4:4026531840","mood":"good"}"#;
        for text in [text, more] {
            assert_eq!(read(packet(text)).unwrap().0, expected);
        }
    }

    #[test]
    fn what_is_no_message_is_an_error() {
        let cut = Packet { is_cut: true, ..packet(r#"{"type":"take"}"#) };
        for (name, packet) in [
            ("cut", cut),
            ("not JSON", packet("take")),
            ("not a message", packet(r#"{"type":"give"}"#)),
            ("a field is missing", packet(r#"{"type":"end"}"#)),
        ] {
            assert!(matches!(read(packet), Err(HandoverError::Unexpected(_))), "{name}");
        }
    }

    #[test]
    fn the_longest_names_fit_a_packet() {
        let name = SocketName {
            owner: format!("{}//Pod/{}/{}", "c".repeat(63), "n".repeat(63), "p".repeat(253)).into(),
            network: format!("{}:{}", u64::MAX, u64::MAX).into(),
            transport: Transport::Datagram,
            address: "[ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff]:65535".parse().unwrap(),
        };
        let length = written(&Message::Socket(name)).unwrap().len();
        assert!(length <= 1024, "{length}");
    }
}
