//! Filters at work on the bytes of connections that carry no HTTP.
//!
//! Each filter sees what the client sends in request order and what the server sends in reverse, piece by piece as they
//! come, and passes on what it lets pass: every byte is shown to it once, or again with more as long as it holds it. A
//! destination without such filters has none of this: its connections are copied.

use crate::{Exchange, Side};
use bytes::Bytes;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::Notify;

/// What a filter makes of what it is shown.
#[derive(Debug, PartialEq, Eq)]
pub enum Passage {
    /// These bytes go on: what it was shown and held, or what it put in their place; and the end with them if that was
    /// shown.
    Pass(Bytes),
    /// It keeps what it was shown, and is shown it again when more comes or when it is woken.
    Hold {
        /// How many bytes it keeps.
        kept: usize,
        /// How long it may do so where nothing more can come; then it is told ([`ConnectionFilter::overdue`]).
        patience: Duration,
    },
    /// The connection ends; the reason is for logs.
    Close(String),
}

/// Who ended a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Closer {
    /// This proxy, or the server behind it.
    Here,
    /// The client.
    Client,
}

/// Wakes a connection, so that its filters are asked again: for the bytes of the client ([`Side::Request`]) or of the
/// server ([`Side::Response`]).
#[derive(Clone, Debug, Default)]
pub struct Wakers([Arc<Notify>; 2]);

impl Wakers {
    /// That of one side.
    pub fn of(&self, side: Side) -> &Arc<Notify> {
        let [request, response] = &self.0;
        match side {
            Side::Request => request,
            Side::Response => response,
        }
    }
}

/// One filter at work on one connection. It is dropped when the connection ends, and told before unless the task of the
/// connection was dropped. Facts of the connection are in the [`Exchange`]: its ends, its endpoint once there is one, and
/// bytes so far in [`crate::Measures`].
pub trait ConnectionFilter: Send {
    /// The connection is here; nothing was read of it and no endpoint chosen. A filter that holds it is called again when
    /// woken. What it passes must be empty.
    fn opened(&mut self, exchange: &mut Exchange) -> Passage;

    /// More bytes of one side; `end`: the last ones, perhaps none.
    fn data(&mut self, exchange: &mut Exchange, side: Side, bytes: Bytes, end: bool) -> Passage;

    /// The connection was woken: whether this filter lets go of what it holds of that side. One that holds nothing passes
    /// nothing, or closes.
    fn woken(&mut self, exchange: &mut Exchange, side: Side) -> Passage;

    /// It held something for longer than its patience; [`Passage::Hold`] is taken for an end.
    fn overdue(&mut self, exchange: &mut Exchange, side: Side) -> Passage;

    /// The connection is over. Called once.
    fn closed(&mut self, exchange: &mut Exchange, by: Closer);
}
