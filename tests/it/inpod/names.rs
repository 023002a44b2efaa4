//! Questions of DNS as a program in a pod asks them, and what it makes of the answers.

use anyhow::{Context, Result, ensure};
use cairn_net::Namespace;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

const ANSWER_MAX: Duration = Duration::from_secs(30);

/// Asks for the IPv4 addresses of a name, in a packet and over a connection; both must be told the same. The answer's code,
/// and the addresses in order.
pub fn ask(pod: &Namespace, server: SocketAddr, name: &str) -> Result<(u8, Vec<Ipv4Addr>)> {
    let question = question(name);
    let socket = pod.within(|| UdpSocket::bind("0.0.0.0:0"))??;
    socket.set_read_timeout(Some(ANSWER_MAX))?;
    socket.send_to(&question, server)?;
    let mut buffer = [0; 4096];
    let (length, from) = socket.recv_from(&mut buffer).context("no answer")?;
    ensure!(from == server, "the answer comes from {from}");
    let told = read(buffer.get(..length).unwrap_or_default())?;
    let mut stream = pod.within(|| TcpStream::connect_timeout(&server, ANSWER_MAX))??;
    stream.set_read_timeout(Some(ANSWER_MAX))?;
    stream.write_all(&[&(question.len() as u16).to_be_bytes()[..], &question].concat())?;
    let mut size = [0; 2];
    stream.read_exact(&mut size).context("no answer over TCP")?;
    let mut answer = vec![0; u16::from_be_bytes(size).into()];
    stream.read_exact(&mut answer)?;
    let again = read(&answer)?;
    ensure!(again == told, "{told:?} in a packet, {again:?} over a connection");
    Ok(told)
}

fn question(name: &str) -> Vec<u8> {
    let mut bytes = vec![0x2a, 0x2a, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
    for label in name.split('.') {
        bytes.push(label.len() as u8);
        bytes.extend(label.as_bytes());
    }
    bytes.extend([0, 0, 1, 0, 1]);
    bytes
}

/// The code of an answer and the IPv4 addresses in it.
fn read(answer: &[u8]) -> Result<(u8, Vec<Ipv4Addr>)> {
    ensure!(answer.get(..2) == Some(&[0x2a, 0x2a]) && answer.len() > 12, "no answer to the question");
    let name_end = |mut at: usize| {
        while answer[at] != 0 {
            if answer[at] >= 192 {
                return at + 2;
            }
            at += 1 + usize::from(answer[at]);
        }
        at + 1
    };
    let mut at = name_end(12) + 4;
    let mut addresses = Vec::new();
    for _ in 0..u16::from_be_bytes([answer[6], answer[7]]) {
        at = name_end(at);
        let (kind, length) = (answer[at + 1], usize::from(answer[at + 9]));
        at += 10;
        if kind == 1 {
            addresses.push(Ipv4Addr::new(answer[at], answer[at + 1], answer[at + 2], answer[at + 3]));
        }
        at += length;
    }
    Ok((answer[3] & 0xf, addresses))
}

/// A server that knows one address for every name, but for those that begin with `no`.
pub struct Server {
    ending: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Server {
    pub fn start(namespace: &Namespace, at: SocketAddr, address: Ipv4Addr) -> Result<Self> {
        let ending = Arc::new(AtomicBool::new(false));
        let (packets, listener) =
            namespace.within(|| (UdpSocket::bind(at), std::net::TcpListener::bind(at)))?;
        let (packets, listener) = (packets?, listener?);
        packets.set_read_timeout(Some(Duration::from_millis(20)))?;
        listener.set_nonblocking(true)?;
        let (told, also_told) = (Arc::clone(&ending), Arc::clone(&ending));
        let by_packet = std::thread::spawn(move || {
            let mut buffer = [0; 512];
            while !told.load(Ordering::Relaxed) {
                if let Ok((length, peer)) = packets.recv_from(&mut buffer) {
                    packets.send_to(&reply(&buffer[..length], address), peer).unwrap();
                }
            }
        });
        let by_connection = std::thread::spawn(move || {
            while !also_told.load(Ordering::Relaxed) {
                match listener.accept() {
                    // Whoever goes away early is not waited for.
                    Ok((stream, _)) => drop(answer_one(stream, address)),
                    Err(_) => std::thread::sleep(Duration::from_millis(5)),
                }
            }
        });
        Ok(Self { ending, threads: vec![by_packet, by_connection] })
    }
}

fn answer_one(mut stream: TcpStream, address: Ipv4Addr) -> std::io::Result<()> {
    stream.set_nonblocking(false)?;
    stream.set_read_timeout(Some(ANSWER_MAX))?;
    let mut size = [0; 2];
    stream.read_exact(&mut size)?;
    let mut question = vec![0; u16::from_be_bytes(size).into()];
    stream.read_exact(&mut question)?;
    let answer = reply(&question, address);
    stream.write_all(&[&(answer.len() as u16).to_be_bytes()[..], &answer].concat())
}

fn reply(question: &[u8], address: Ipv4Addr) -> Vec<u8> {
    let mut answer = question.to_vec();
    answer[2] |= 0x80;
    if question.get(13..15) == Some(b"no") {
        answer[3] = 0x83;
        return answer;
    }
    answer[7] = 1;
    answer.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 9, 0, 4]);
    answer.extend(address.octets());
    answer
}

impl Drop for Server {
    fn drop(&mut self) {
        self.ending.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            // What it could not do, its client has noticed.
            let _ended = thread.join();
        }
    }
}
