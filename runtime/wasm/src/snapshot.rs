//! Modules written anew, so that instances of them begin where another one stands: [`open`] makes a module whose instances can
//! be looked into, and [`freeze`] one whose instances begin with the memory and globals that such an instance has.
//!
//! What a guest keeps are its memory, its globals and its tables. Memory becomes data segments, which the engine maps
//! copy-on-write; globals become initial values. Tables stay as the module fills them, so a module that changes
//! its tables itself is refused.

use std::ops::Range;
use wasm_encoder::{ConstExpr, DataSection, Encode, MemorySection, MemoryType, Module, RawSection};
use wasmparser::{DataKind, Operator, Parser, Payload, ValType};

/// Why a module cannot be written anew.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SnapshotError {
    /// The bytes are no module.
    #[error("it cannot be read")]
    Malformed(#[from] wasmparser::BinaryReaderError),
    /// An instruction of it changes a table.
    #[error("the module changes its tables itself ({0}), which a snapshot does not hold")]
    Tables(&'static str),
    /// A global that can change holds a reference.
    #[error("the module's global {0} holds a reference and can change, which a snapshot does not hold")]
    Reference(u32),
    /// A memory that is not plain, or not the only one.
    #[error("the module has no memory of its own, or more than one")]
    Memory,
}

/// The names under which [`open`] exports the globals that can change.
pub(crate) fn export_name(global: u32) -> String {
    format!("cairn:global:{global}")
}

/// What a guest keeps.
pub(crate) struct Frozen<'a> {
    /// All of its memory, whole pages.
    pub(crate) memory: &'a [u8],
    /// The globals that can change, by index.
    pub(crate) globals: Vec<(u32, Value)>,
}

/// The value of a global, floats as their bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Value {
    I32(i32),
    I64(i64),
    F32(u32),
    F64(u64),
    V128(u128),
}

impl Value {
    fn expression(self) -> ConstExpr {
        match self {
            Self::I32(value) => ConstExpr::i32_const(value),
            Self::I64(value) => ConstExpr::i64_const(value),
            Self::F32(bits) => ConstExpr::f32_const(wasm_encoder::Ieee32::new(bits)),
            Self::F64(bits) => ConstExpr::f64_const(wasm_encoder::Ieee64::new(bits)),
            // The same bits: the encoder writes them as they are.
            Self::V128(bits) => ConstExpr::v128_const(bits as i128),
        }
    }
}

/// The module, and what to look at in its instances.
pub(crate) struct Opened {
    pub(crate) module: Vec<u8>,
    /// The globals that can change, by index.
    pub(crate) globals: Vec<u32>,
}

/// The sections that are written anew, by their numbers.
const MEMORY: u8 = 5;
const GLOBAL: u8 = 6;
const START: u8 = 8;
const DATA_COUNT: u8 = 12;
const DATA: u8 = 11;
const EXPORT: u8 = 7;

/// A module that does what this one does, and whose instances can be looked into.
///
/// # Errors
/// When a snapshot would not hold all that a guest of this module keeps.
pub(crate) fn open(bytes: &[u8]) -> Result<Opened, SnapshotError> {
    let mut module = Module::new();
    let mut globals = Vec::new();
    let mut memories = 0;
    for payload in Parser::new(0).parse_all(bytes) {
        let payload = payload?;
        match &payload {
            Payload::MemorySection(section) => memories = u32::saturating_add(memories, section.count()),
            Payload::GlobalSection(section) => {
                for (index, global) in (0..).zip(section.clone()) {
                    let kind = global?.ty;
                    match kind.content_type {
                        ValType::Ref(_) if kind.mutable => return Err(SnapshotError::Reference(index)),
                        _ if kind.mutable => globals.push(index),
                        _ => {}
                    }
                }
            }
            Payload::CodeSectionEntry(body) => {
                for operator in body.get_operators_reader()? {
                    refuse(&operator?)?;
                }
            }
            _ => {}
        }
        let Some((id, range)) = payload.as_section() else { continue };
        // Where the reader found it.
        let data = bytes.get(range).unwrap_or_default();
        if id == EXPORT {
            let data = with_exports(data, &globals)?;
            module.section(&RawSection { id, data: &data });
        } else {
            module.section(&RawSection { id, data });
        }
    }
    if memories != 1 {
        return Err(SnapshotError::Memory);
    }
    Ok(Opened { module: module.finish(), globals })
}

/// Refuses what changes a table.
fn refuse(operator: &Operator<'_>) -> Result<(), SnapshotError> {
    let what = match operator {
        Operator::TableSet { .. } => "table.set",
        Operator::TableGrow { .. } => "table.grow",
        Operator::TableFill { .. } => "table.fill",
        Operator::TableCopy { .. } => "table.copy",
        Operator::TableInit { .. } => "table.init",
        _ => return Ok(()),
    };
    Err(SnapshotError::Tables(what))
}

/// The exports of a module, and these globals.
fn with_exports(section: &[u8], globals: &[u32]) -> Result<Vec<u8>, SnapshotError> {
    const GLOBAL_KIND: u8 = 3;
    let mut reader = wasmparser::BinaryReader::new(section, 0);
    let count = reader.read_var_u32()?;
    let mut data = Vec::with_capacity(section.len() + 32 * globals.len());
    count.saturating_add(globals.len() as u32).encode(&mut data);
    data.extend_from_slice(section.get(reader.original_position()..).unwrap_or_default());
    for global in globals {
        export_name(*global).as_str().encode(&mut data);
        data.push(GLOBAL_KIND);
        global.encode(&mut data);
    }
    Ok(data)
}

/// The module that [`open`] made, with what one of its instances keeps in the place of what it began with. Nothing of the
/// module's start is left in it.
///
/// # Errors
/// When the module is another one.
pub(crate) fn freeze(opened: &[u8], frozen: &Frozen<'_>) -> Result<Vec<u8>, SnapshotError> {
    let mut module = Module::new();
    let mut passive = Vec::new();
    let mut counts = false;
    let (mut written, segments) = (false, segments(frozen.memory));
    // The numbers of data segments stand in code when the module counts them.
    for payload in Parser::new(0).parse_all(opened) {
        match payload? {
            Payload::DataCountSection { .. } => counts = true,
            Payload::DataSection(section) => {
                for data in section {
                    let data = data?;
                    passive.push(if matches!(data.kind, DataKind::Passive) { data.data } else { &[] });
                }
            }
            _ => {}
        }
    }
    if !counts {
        passive.clear();
    }
    for payload in Parser::new(0).parse_all(opened) {
        let payload = payload?;
        let Some((id, range)) = payload.as_section() else { continue };
        // Where the reader found it.
        let section = opened.get(range).unwrap_or_default();
        match (id, &payload) {
            (START, _) => {}
            (MEMORY, Payload::MemorySection(memories)) => {
                module.section(&memory(memories.clone(), frozen.memory.len())?);
            }
            (GLOBAL, Payload::GlobalSection(globals)) => {
                let data = globals_with(section, globals.clone(), &frozen.globals)?;
                module.section(&RawSection { id, data: &data });
            }
            (DATA_COUNT, _) => {
                let count = (passive.len() + segments.len()) as u32;
                module.section(&wasm_encoder::DataCountSection { count });
            }
            (DATA, _) => {
                module.section(&data(&passive, frozen.memory, &segments));
                written = true;
            }
            _ => {
                // What follows the place of data are sections for tools.
                module.section(&RawSection { id, data: section });
            }
        }
    }
    if !written {
        module.section(&data(&passive, frozen.memory, &segments));
    }
    Ok(module.finish())
}

fn memory(
    memories: wasmparser::MemorySectionReader<'_>,
    bytes: usize,
) -> Result<MemorySection, SnapshotError> {
    let mut section = MemorySection::new();
    for memory in memories {
        let memory = memory?;
        if memory.memory64 || memory.shared || memory.page_size_log2.is_some() {
            return Err(SnapshotError::Memory);
        }
        let minimum = (bytes / PAGE_BYTES) as u64;
        let maximum = memory.maximum;
        let kind = MemoryType { minimum, maximum, memory64: false, shared: false, page_size_log2: None };
        section.memory(kind);
    }
    Ok(section)
}

/// The globals of a module, those that can change with these values.
fn globals_with(
    section: &[u8],
    globals: wasmparser::GlobalSectionReader<'_>,
    values: &[(u32, Value)],
) -> Result<Vec<u8>, SnapshotError> {
    let start = globals.range().start;
    let end = section.len();
    let entries = globals.clone().into_iter_with_offsets().collect::<Result<Vec<_>, _>>()?;
    let at = |index: usize| entries.get(index).map_or(end, |(offset, _)| offset - start);
    let mut data = Vec::with_capacity(section.len());
    (entries.len() as u32).encode(&mut data);
    for (index, (_, global)) in entries.iter().enumerate() {
        let value = values.iter().find(|(wanted, _)| *wanted as usize == index);
        match value {
            Some((_, value)) => {
                data.push(code_of(global.ty.content_type).ok_or(SnapshotError::Reference(index as u32))?);
                data.push(1);
                value.expression().encode(&mut data);
            }
            None => data.extend_from_slice(section.get(at(index)..at(index + 1)).unwrap_or_default()),
        }
    }
    Ok(data)
}

/// How the type of a number is written.
fn code_of(kind: ValType) -> Option<u8> {
    match kind {
        ValType::I32 => Some(0x7f),
        ValType::I64 => Some(0x7e),
        ValType::F32 => Some(0x7d),
        ValType::F64 => Some(0x7c),
        ValType::V128 => Some(0x7b),
        ValType::Ref(_) => None,
    }
}

/// The memory as data segments, behind those that code knows by their numbers.
fn data(passive: &[&[u8]], memory: &[u8], segments: &[Range<usize>]) -> DataSection {
    let mut section = DataSection::new();
    for bytes in passive {
        section.passive(bytes.iter().copied());
    }
    for segment in segments {
        // Memory ends below 4 GiB.
        let offset = ConstExpr::i32_const(segment.start as u32 as i32);
        section.active(0, &offset, memory.get(segment.clone()).unwrap_or_default().iter().copied());
    }
    section
}

/// A page of WebAssembly.
const PAGE_BYTES: usize = 64 << 10;
/// The least size of the pieces in which memory is looked through; runs of zeros that are shorter go into a segment.
const PIECE_BYTES_MIN: usize = 4 << 10;
/// The most pieces, so that there are fewer segments than the 100,000 that a module may have.
const PIECES_MAX: usize = 1 << 16;

/// Where there is anything but zeros.
fn segments(memory: &[u8]) -> Vec<Range<usize>> {
    let mut segments: Vec<Range<usize>> = Vec::new();
    let piece_bytes = memory.len().div_ceil(PIECES_MAX).next_power_of_two().max(PIECE_BYTES_MIN);
    for (index, piece) in memory.chunks(piece_bytes).enumerate() {
        if piece.iter().all(|byte| *byte == 0) {
            continue;
        }
        let range = index * piece_bytes..index * piece_bytes + piece.len();
        match segments.last_mut() {
            Some(last) if last.end == range.start => last.end = range.end,
            _ => segments.push(range),
        }
    }
    segments
}
