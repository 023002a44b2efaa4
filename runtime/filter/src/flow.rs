//! One direction of an exchange's body on its way through the filters. Nothing is read ahead: whoever wants the next
//! piece asks the last filter for it, which asks the one before it, up to the sender.

use crate::running::Active;
use crate::{
    Body, BodyBroken, BodyRead, Chunk, Exchange, HeldHead, Hold, Outcome, Part, Piece, Side, Until, Verdict,
    WhenFull,
};
use bytes::BytesMut;
use smallvec::SmallVec;
use std::collections::VecDeque;
use std::task::{Context, Poll, ready};

/// Where a body is among the filters.
pub(crate) struct Flow {
    stages: SmallVec<[Stage; 4]>,
    /// What has passed all filters and was not asked for yet.
    passed: VecDeque<Piece>,
    /// Some filter put other bytes in the place of those that came.
    is_changed: bool,
}

/// One filter in the way of the body.
struct Stage {
    filter: usize,
    /// What came for it and was not shown to it yet.
    ahead: VecDeque<Piece>,
    state: State,
}

enum State {
    /// It holds nothing.
    Open,
    /// It holds a chunk.
    Held { chunk: Chunk, until: Option<Until>, is_full: bool },
    /// It is asked the same again when the future resolves.
    Waits { chunk: Chunk, until: Until, asked: Asked },
}

/// What a filter was asked.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Asked {
    Body,
    Trailers,
    /// What came of its holding.
    Resumed,
}

/// All that a filter needs to look at a body.
pub(crate) struct Scene<'a> {
    pub(crate) side: Side,
    pub(crate) filters: &'a mut [Active],
    pub(crate) exchange: &'a mut Exchange,
    pub(crate) source: &'a mut dyn Body,
    /// The head, and the stage of the filter that holds it; `None` once it is gone.
    pub(crate) head: Option<(usize, HeldHead<'a>)>,
    pub(crate) held_max: usize,
}

impl Flow {
    /// A body that meets the filters of these indices in this order.
    pub(crate) fn new(filters: impl Iterator<Item = usize>) -> Self {
        let stage = |filter| Stage { filter, ahead: VecDeque::new(), state: State::Open };
        Self { stages: filters.map(stage).collect(), passed: VecDeque::new(), is_changed: false }
    }

    /// Whether some filter put other bytes in the place of those that came.
    pub(crate) fn is_changed(&self) -> bool {
        self.is_changed
    }

    /// The next piece that all filters let pass.
    pub(crate) fn poll(
        &mut self,
        cx: &mut Context<'_>,
        scene: &mut Scene<'_>,
    ) -> Poll<Result<Piece, Outcome>> {
        self.poll_before(self.stages.len(), cx, scene)
    }

    /// Lets a stage hold before anything was shown to it.
    pub(crate) fn hold(&mut self, stage: usize, hold: Hold) {
        if let Some(stage) = self.stages.get_mut(stage) {
            stage.state = State::Held { chunk: Chunk::default(), until: hold.until, is_full: false };
        }
    }

    /// Resolves when a stage that holds lets go.
    pub(crate) fn poll_released(
        &mut self,
        stage: usize,
        cx: &mut Context<'_>,
        scene: &mut Scene<'_>,
    ) -> Poll<Result<(), Outcome>> {
        while self.stages.get(stage).is_some_and(|stage| !matches!(stage.state, State::Open)) {
            ready!(self.poll_stage(stage, cx, scene))?;
        }
        Poll::Ready(Ok(()))
    }

    /// Reads what comes for a stage until its end or until there is more than `bytes_max`. It stays there.
    pub(crate) fn poll_read(
        &mut self,
        stage: usize,
        bytes_max: usize,
        cx: &mut Context<'_>,
        scene: &mut Scene<'_>,
    ) -> Poll<Result<BodyRead, Outcome>> {
        loop {
            let Some(Stage { ahead, .. }) = self.stages.get(stage) else {
                return Poll::Ready(Ok(BodyRead::default()));
            };
            let length: usize = ahead.iter().map(Piece::length).sum();
            let is_over = ahead.back().is_some_and(Piece::is_last);
            if length > bytes_max || is_over {
                return Poll::Ready(Ok(read_of(ahead, length, bytes_max)));
            }
            ready!(self.poll_more(stage, cx, scene))?;
        }
    }

    /// All that was read and not passed on, in order, for a body that no filter wants to see.
    pub(crate) fn into_read(self) -> impl Iterator<Item = Piece> {
        // Further on is what came earlier.
        let ahead = self.stages.into_iter().rev().flat_map(|stage| stage.ahead);
        self.passed.into_iter().chain(ahead)
    }

    /// The next piece on its way to a stage; beyond the last stage: to whoever asked.
    fn poll_before(
        &mut self,
        stage: usize,
        cx: &mut Context<'_>,
        scene: &mut Scene<'_>,
    ) -> Poll<Result<Piece, Outcome>> {
        loop {
            if let Some(piece) = self.ahead(stage).pop_front() {
                return Poll::Ready(Ok(piece));
            }
            ready!(self.poll_more(stage, cx, scene))?;
        }
    }

    /// Moves on, so that something more may stand before a stage.
    fn poll_more(
        &mut self,
        stage: usize,
        cx: &mut Context<'_>,
        scene: &mut Scene<'_>,
    ) -> Poll<Result<(), Outcome>> {
        match stage.checked_sub(1) {
            Some(before) => self.poll_stage(before, cx, scene),
            None => {
                let piece = ready!(scene.source.poll_piece(cx));
                let piece = piece.map_err(|BodyBroken| Outcome::BodyBroken)?;
                self.ahead(0).push_back(piece);
                Poll::Ready(Ok(()))
            }
        }
    }

    fn ahead(&mut self, stage: usize) -> &mut VecDeque<Piece> {
        self.stages.get_mut(stage).map_or(&mut self.passed, |stage| &mut stage.ahead)
    }

    /// Shows a filter what comes next, and does what it says.
    fn poll_stage(
        &mut self,
        at: usize,
        cx: &mut Context<'_>,
        scene: &mut Scene<'_>,
    ) -> Poll<Result<(), Outcome>> {
        let Some(stage) = self.stages.get_mut(at) else { return Poll::Ready(Ok(())) };
        match &mut stage.state {
            State::Open => {}
            State::Waits { until, .. } => {
                ready!(until.as_mut().poll(cx));
                return self.ask_again(at, scene);
            }
            State::Held { chunk, until, is_full } => {
                if until.as_mut().is_some_and(|until| until.as_mut().poll(cx).is_ready()) {
                    return self.ask_again(at, scene);
                }
                if chunk.is_last() && until.is_none() {
                    let chunk = std::mem::take(chunk);
                    return self.pass(at, chunk);
                }
                if chunk.is_last() || *is_full {
                    return Poll::Pending;
                }
            }
        }
        let piece = ready!(self.poll_before(at, cx, scene))?;
        let mut chunk = match self.take(at) {
            State::Held { chunk, .. } => chunk,
            State::Open | State::Waits { .. } => Chunk::default(),
        };
        chunk.add(piece);
        let asked = if chunk.trailers.is_some() { Asked::Trailers } else { Asked::Body };
        self.show(at, scene, chunk, asked)
    }

    fn take(&mut self, at: usize) -> State {
        self.stages.get_mut(at).map_or(State::Open, |stage| std::mem::replace(&mut stage.state, State::Open))
    }

    /// What a filter waited for is here.
    fn ask_again(&mut self, at: usize, scene: &mut Scene<'_>) -> Poll<Result<(), Outcome>> {
        let mut chunk = match self.take(at) {
            State::Open => return Poll::Ready(Ok(())),
            State::Waits { chunk, asked: Asked::Resumed, .. } | State::Held { chunk, .. } => chunk,
            State::Waits { chunk, asked, .. } => return self.show(at, scene, chunk, asked),
        };
        let Some((active, exchange, part)) = self.at_work(at, scene, &mut chunk) else {
            return self.pass(at, chunk);
        };
        let verdict = active.filter.resumed(exchange, part);
        self.conclude(at, scene.held_max, chunk, verdict, Asked::Resumed)
    }

    fn show(
        &mut self,
        at: usize,
        scene: &mut Scene<'_>,
        mut chunk: Chunk,
        asked: Asked,
    ) -> Poll<Result<(), Outcome>> {
        let (body, trailers) = scene.side.phases();
        let Some((active, exchange, part)) = self.at_work(at, scene, &mut chunk) else {
            return self.pass(at, chunk);
        };
        let verdict = if asked == Asked::Trailers {
            // Who sees the body may hold some of it when the trailers come.
            if !active.phases.intersects(body | trailers) {
                return self.pass(at, chunk);
            }
            active.filter.trailers(exchange, part)
        } else {
            if !active.phases.contains(body) {
                return self.pass(at, chunk);
            }
            active.filter.body(exchange, part)
        };
        self.conclude(at, scene.held_max, chunk, verdict, asked)
    }

    /// The filter of a stage, and what it is shown: the head too, if it holds that.
    fn at_work<'s>(
        &self,
        at: usize,
        scene: &'s mut Scene<'_>,
        chunk: &'s mut Chunk,
    ) -> Option<(&'s mut Active, &'s mut Exchange, Part<'s>)> {
        let active = scene.filters.get_mut(self.stages.get(at)?.filter)?;
        let head = match &mut scene.head {
            Some((holder, HeldHead::Request(head))) if *holder == at => Some(HeldHead::Request(head)),
            Some((holder, HeldHead::Response(head))) if *holder == at => Some(HeldHead::Response(head)),
            _ => None,
        };
        Some((active, scene.exchange, Part { side: scene.side, head, chunk }))
    }

    fn conclude(
        &mut self,
        at: usize,
        held_max: usize,
        chunk: Chunk,
        verdict: Verdict,
        asked: Asked,
    ) -> Poll<Result<(), Outcome>> {
        self.is_changed |= chunk.is_changed;
        let state = match verdict {
            // There is nothing to read but what it is shown.
            Verdict::Continue | Verdict::ReadBody { .. } => return self.pass(at, chunk),
            Verdict::Reply(reply) => return Poll::Ready(Err(Outcome::Reply(reply))),
            Verdict::Reset => return Poll::Ready(Err(Outcome::Reset)),
            Verdict::Wait(until) => State::Waits { chunk, until, asked },
            Verdict::Hold(hold) => {
                let held = chunk.bytes.len().saturating_add(hold.kept);
                let is_full = match hold.when_full {
                    WhenFull::Fail if held > held_max => return Poll::Ready(Err(Outcome::TooLarge)),
                    WhenFull::Fail => false,
                    WhenFull::Wait => held >= held_max,
                };
                State::Held { chunk, until: hold.until, is_full }
            }
        };
        if let Some(stage) = self.stages.get_mut(at) {
            stage.state = state;
        }
        Poll::Ready(Ok(()))
    }

    /// Passes a chunk on to the next stage.
    fn pass(&mut self, at: usize, chunk: Chunk) -> Poll<Result<(), Outcome>> {
        if let Some(stage) = self.stages.get_mut(at) {
            stage.state = State::Open;
        }
        let Chunk { bytes, end_of_stream, trailers, .. } = chunk;
        let ends_here = end_of_stream && trailers.is_none();
        let next = self.ahead(at + 1);
        if !bytes.is_empty() || ends_here {
            next.push_back(Piece::Data { bytes, end_of_stream: ends_here });
        }
        if let Some(trailers) = trailers {
            next.push_back(Piece::Trailers(trailers));
        }
        Poll::Ready(Ok(()))
    }
}

/// The first bytes of what stands ready.
fn read_of(ahead: &VecDeque<Piece>, length: usize, bytes_max: usize) -> BodyRead {
    let mut bytes = BytesMut::with_capacity(length.min(bytes_max));
    for piece in ahead {
        if let Piece::Data { bytes: data, .. } = piece {
            let room = bytes_max.saturating_sub(bytes.len());
            bytes.extend_from_slice(data.get(..room).unwrap_or(data));
        }
    }
    BodyRead { bytes: bytes.freeze(), is_whole: length <= bytes_max }
}
