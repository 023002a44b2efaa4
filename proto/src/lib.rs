//! The protobuf messages Cairn speaks, and their generated types.
