//! Values of properties, and the form in which guests get them: numbers and times are 64-bit little-endian, truth is one
//! byte, maps and lists are serialised like header maps.

use super::super::log::nanoseconds_since_epoch;
use crate::abi::Status;
use crate::pairs;
use serde_json::Value as Json;
use std::borrow::Cow;
use std::time::{Duration, SystemTime};

/// The value of a property.
#[derive(Clone, Debug, PartialEq)]
pub(in crate::host) enum Value<'a> {
    Bytes(Cow<'a, [u8]>),
    Int(i64),
    UInt(u64),
    Float(f64),
    Bool(bool),
    /// Nanoseconds.
    Time(i64),
    Map(Vec<(Vec<u8>, Vec<u8>)>),
    /// An object of which only fields have a form.
    Whole,
}

impl<'a> Value<'a> {
    pub(in crate::host) fn text(text: &'a str) -> Self {
        Self::Bytes(Cow::Borrowed(text.as_bytes()))
    }

    pub(in crate::host) fn bytes(bytes: &'a [u8]) -> Self {
        Self::Bytes(Cow::Borrowed(bytes))
    }

    pub(in crate::host) fn owned(text: String) -> Self {
        Self::Bytes(Cow::Owned(text.into_bytes()))
    }

    pub(in crate::host) fn time(time: SystemTime) -> Self {
        Self::Time(i64::try_from(nanoseconds_since_epoch(time)).unwrap_or(i64::MAX))
    }

    pub(in crate::host) fn duration(duration: Duration) -> Self {
        Self::Time(i64::try_from(duration.as_nanos()).unwrap_or(i64::MAX))
    }

    /// A part of a message, as CEL sees it; `None` for null.
    pub(in crate::host) fn of_json(json: &Json) -> Option<Self> {
        Some(match json {
            Json::Null => return None,
            Json::Bool(flag) => Self::Bool(*flag),
            Json::Number(number) => Self::Float(number.as_f64().unwrap_or_default()),
            Json::String(text) => Self::Bytes(Cow::Owned(text.clone().into_bytes())),
            Json::Array(list) => Self::Map(list.iter().map(|item| (serialized(item), Vec::new())).collect()),
            Json::Object(map) => {
                let entry = |(name, item): (&String, &Json)| (name.clone().into_bytes(), serialized(item));
                Self::Map(map.iter().map(entry).collect())
            }
        })
    }

    /// Appends the form in which guests get it.
    pub(in crate::host) fn write(&self, out: &mut Vec<u8>) -> Result<(), Status> {
        match self {
            Self::Bytes(bytes) => out.extend_from_slice(bytes),
            Self::Int(number) | Self::Time(number) => out.extend_from_slice(&number.to_le_bytes()),
            Self::UInt(number) => out.extend_from_slice(&number.to_le_bytes()),
            Self::Float(number) => out.extend_from_slice(&number.to_le_bytes()),
            Self::Bool(flag) => out.push(u8::from(*flag)),
            Self::Map(map) => {
                let entries = map.iter().map(|(name, value)| (&name[..], &value[..]));
                pairs::write(out, map.len() as u32, entries);
            }
            Self::Whole => return Err(Status::SerializationFailure),
        }
        Ok(())
    }
}

fn serialized(json: &Json) -> Vec<u8> {
    let mut out = Vec::new();
    // Parts of messages always have a form.
    let _always = Value::of_json(json).map(|value| value.write(&mut out));
    out
}
