//! Questions that the mesh does not answer, passed on to the servers that the node's pods use, from the pod that asks.

use super::message::{self, MESSAGE_BYTES_MAX};
use cairn_net::{ConnectOptions, Namespace, NetError};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UdpSocket;

/// How long a server may take.
const ANSWER_MAX: Duration = Duration::from_secs(2);

/// How often the servers are gone through.
const ROUNDS: usize = 2;

/// As many servers of a file are used (as by the C library).
const SERVERS_MAX: usize = 3;

const PORT: u16 = 53;

/// Why a question has no answer.
#[derive(Debug, thiserror::Error)]
pub enum ForwardError {
    /// There are no servers.
    #[error("no servers are known")]
    NoServers,
    /// A socket could not be had.
    #[error(transparent)]
    Net(#[from] NetError),
    /// The server cannot be reached.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// The server did not answer.
    #[error("no answer in time")]
    Timeout,
    /// It answered that it cannot.
    #[error("the server failed")]
    Failed(Vec<u8>),
}

/// How a question came, and so how it is passed on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    /// In a packet.
    Udp,
    /// Over a connection.
    Tcp,
}

/// The servers, and from where they are asked.
#[derive(Clone, Debug)]
pub struct Forwarder {
    /// The servers, in order.
    pub servers: Vec<SocketAddr>,
    /// The network namespace of the pod that asks; `None` is our own.
    pub namespace: Option<Namespace>,
    /// The mark on packets of ours.
    pub mark: Option<u32>,
}

/// The servers in a file of the C library's form; none when it cannot be read.
pub fn servers_of(file: &Path) -> Vec<SocketAddr> {
    let text = std::fs::read_to_string(file).unwrap_or_default();
    parse_servers(&text)
}

fn parse_servers(text: &str) -> Vec<SocketAddr> {
    let address = |line: &str| {
        let mut words = line.split_whitespace();
        let is_server = words.next() == Some("nameserver");
        words.next().filter(|_| is_server)?.parse::<IpAddr>().ok()
    };
    text.lines().filter_map(address).take(SERVERS_MAX).map(|address| SocketAddr::new(address, PORT)).collect()
}

impl Forwarder {
    /// Passes a question on, to one server after the other until one answers, and again. The answer has the question's
    /// own number.
    ///
    /// # Errors
    /// When none answers: the last reason.
    pub async fn ask(&self, question: &[u8], transport: Transport) -> Result<Vec<u8>, ForwardError> {
        let mut last = ForwardError::NoServers;
        for _ in 0..ROUNDS {
            for server in &self.servers {
                match self.ask_one(*server, question, transport).await {
                    Ok(answer) => return Ok(answer),
                    Err(error) => {
                        tracing::debug!(%server, %error, "DNS server did not answer");
                        last = error;
                    }
                }
            }
        }
        // What the last one said is better than silence.
        match last {
            ForwardError::Failed(answer) => Ok(answer),
            other => Err(other),
        }
    }

    async fn ask_one(
        &self,
        server: SocketAddr,
        question: &[u8],
        transport: Transport,
    ) -> Result<Vec<u8>, ForwardError> {
        let own = u16::from_be_bytes([
            question.first().copied().unwrap_or(0),
            question.get(1).copied().unwrap_or(0),
        ]);
        // Whoever cannot see our packets must guess this and the port.
        let id = fastrand::u16(..);
        let mut asked = question.to_vec();
        message::renumber(&mut asked, id);
        let answer = async {
            match transport {
                Transport::Udp => self.over_udp(server, &asked, id).await,
                Transport::Tcp => self.over_tcp(server, &asked, id).await,
            }
        };
        let mut answer =
            tokio::time::timeout(ANSWER_MAX, answer).await.map_err(|_| ForwardError::Timeout)??;
        message::renumber(&mut answer, own);
        if message::is_failure(&answer) { Err(ForwardError::Failed(answer)) } else { Ok(answer) }
    }

    async fn over_udp(&self, server: SocketAddr, asked: &[u8], id: u16) -> Result<Vec<u8>, ForwardError> {
        let socket = match &self.namespace {
            Some(namespace) => namespace.within(|| cairn_net::datagram(server, self.mark))??,
            None => cairn_net::datagram(server, self.mark)?,
        };
        ask_over(&socket, asked, id).await
    }

    async fn over_tcp(&self, server: SocketAddr, asked: &[u8], id: u16) -> Result<Vec<u8>, ForwardError> {
        let options = ConnectOptions {
            namespace: self.namespace.clone(),
            mark: self.mark,
            timeout: ANSWER_MAX,
            ..ConnectOptions::default()
        };
        let mut stream = cairn_net::connect(server, &options).await?;
        write_framed(&mut stream, asked).await?;
        let answer = read_framed(&mut stream).await?;
        if message::is_answer_to(&answer, id) { Ok(answer) } else { Err(ForwardError::Timeout) }
    }
}

async fn ask_over(socket: &UdpSocket, asked: &[u8], id: u16) -> Result<Vec<u8>, ForwardError> {
    socket.send(asked).await?;
    let mut buffer = vec![0; MESSAGE_BYTES_MAX];
    loop {
        let length = socket.recv(&mut buffer).await?;
        let answer = buffer.get(..length).unwrap_or_default();
        // Anything else is a stray, or somebody's guess.
        if message::is_answer_to(answer, id) {
            return Ok(answer.to_vec());
        }
    }
}

/// Writes a message with its length before it (RFC 1035 §4.2.2), in one go.
///
/// # Errors
/// When the connection broke.
pub async fn write_framed(to: &mut (impl AsyncWriteExt + Unpin), message: &[u8]) -> io::Result<()> {
    let length = u16::try_from(message.len()).unwrap_or(u16::MAX);
    let mut framed = length.to_be_bytes().to_vec();
    framed.extend(message.iter().take(length.into()));
    to.write_all(&framed).await
}

/// Reads a message with its length before it.
///
/// # Errors
/// When the connection broke or ended.
pub async fn read_framed(from: &mut (impl AsyncReadExt + Unpin)) -> io::Result<Vec<u8>> {
    let length = from.read_u16().await?;
    let mut message = vec![0; length.into()];
    from.read_exact(&mut message).await?;
    Ok(message)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn servers_are_read_as_the_c_library_does() {
        let text = "# nameserver 9.9.9.9\nsearch a.svc.cluster.local\nnameserver 10.96.0.10\n nameserver fd00::a\n\
                    nameserver here\noptions ndots:5\nnameserver 1.1.1.1\nnameserver 8.8.8.8\n";
        let servers: Vec<String> = parse_servers(text).iter().map(ToString::to_string).collect();
        assert_eq!(servers, ["10.96.0.10:53", "[fd00::a]:53", "1.1.1.1:53"]);
        assert!(servers_of(Path::new("/nowhere")).is_empty());
    }

    /// A server that answers each question with these second header halves, in turn, and then with the last; no answer for `None`.
    async fn server(answers: Vec<Option<u8>>) -> SocketAddr {
        let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let address = socket.local_addr().unwrap();
        tokio::spawn(async move {
            let mut buffer = [0; 512];
            let last = answers.last().copied().flatten();
            for code in answers.into_iter().chain(std::iter::repeat(last)) {
                let (length, peer) = socket.recv_from(&mut buffer).await.unwrap();
                let Some(code) = code else { continue };
                let mut answer = buffer[..length].to_vec();
                answer[2] |= 0x80;
                answer[3] = code;
                // Somebody guesses, first.
                let mut guess = answer.clone();
                guess[0] ^= 0xff;
                socket.send_to(&guess, peer).await.unwrap();
                socket.send_to(&answer, peer).await.unwrap();
            }
        });
        address
    }

    #[tokio::test]
    async fn servers_are_tried_until_one_answers() {
        let question = [0x12, 0x34, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 1];
        let (failing, good) = (server(vec![Some(2)]).await, server(vec![Some(0x80)]).await);
        let forwarder = Forwarder { servers: vec![failing, good], namespace: None, mark: None };
        let answer = forwarder.ask(&question, Transport::Udp).await.unwrap();
        assert_eq!(answer.get(..4), Some(&[0x12, 0x34, 0x81, 0x80][..]), "with the question's own number");
        // The one that is silent at first answers in the second round.
        let slow = server(vec![None, Some(0x83)]).await;
        let forwarder = Forwarder { servers: vec![slow], namespace: None, mark: None };
        let answer = forwarder.ask(&question, Transport::Udp).await.unwrap();
        assert_eq!(answer.get(3), Some(&0x83), "no such name is an answer");
        let failing = server(vec![Some(2), Some(5)]).await;
        let forwarder = Forwarder { servers: vec![failing], namespace: None, mark: None };
        let answer = forwarder.ask(&question, Transport::Udp).await.unwrap();
        assert_eq!(answer.get(3), Some(&5), "what the last one said");
        let forwarder = Forwarder { servers: Vec::new(), namespace: None, mark: None };
        assert!(matches!(forwarder.ask(&question, Transport::Udp).await, Err(ForwardError::NoServers)));
    }
}
