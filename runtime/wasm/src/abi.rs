//! The numbers of the proxy-wasm ABI (0.1.0, 0.2.0, 0.2.1), and how host functions refuse.

use cairn_filter::Side;

/// The version of the ABI that a module was built for, told by a marker export.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum AbiVersion {
    /// 0.1.0.
    V0_1_0,
    /// 0.2.0.
    V0_2_0,
    /// 0.2.1.
    V0_2_1,
}

/// What a host function answers the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(crate) enum Status {
    Ok = 0,
    NotFound = 1,
    BadArgument = 2,
    SerializationFailure = 3,
    ParseFailure = 4,
    InvalidMemoryAccess = 6,
    Empty = 7,
    CasMismatch = 8,
    InternalFailure = 10,
}

/// Why a host function did not do what was asked: a status for the guest, or a trap that ends it.
pub(crate) enum Refusal {
    Status(Status),
    Trap(wasmtime::Error),
}

impl From<Status> for Refusal {
    fn from(status: Status) -> Self {
        Self::Status(status)
    }
}

impl From<wasmtime::Error> for Refusal {
    fn from(error: wasmtime::Error) -> Self {
        Self::Trap(error)
    }
}

/// The result of a host function on its way to the guest.
pub(crate) type Done = Result<(), Refusal>;

/// Turns the result of a host function into what wasmtime expects of it.
pub(crate) fn answer(done: Done) -> wasmtime::Result<u32> {
    match done {
        Ok(()) => Ok(Status::Ok as u32),
        Err(Refusal::Status(status)) => Ok(status as u32),
        Err(Refusal::Trap(error)) => Err(error),
    }
}

/// Header maps by their number in the ABI.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum MapKind {
    RequestHeaders,
    ResponseHeaders,
    /// What a callback outside of streams brings, by its place in [`crate::delivery::Delivery`].
    Delivered(usize),
    /// What follows a body.
    Trailers(Side),
}

impl MapKind {
    pub(crate) fn from_abi(number: u32) -> Result<Self, Status> {
        match number {
            0 => Ok(Self::RequestHeaders),
            2 => Ok(Self::ResponseHeaders),
            4..=7 => Ok(Self::Delivered(number as usize - 4)),
            1 => Ok(Self::Trailers(Side::Request)),
            3 => Ok(Self::Trailers(Side::Response)),
            _ => Err(Status::BadArgument),
        }
    }
}

/// The guest function that is running, as logs name it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Callback {
    Start,
    ContextCreate,
    VmStart,
    Configure,
    RequestHeaders,
    RequestBody,
    RequestTrailers,
    ResponseHeaders,
    ResponseBody,
    ResponseTrailers,
    NewConnection,
    DownstreamData,
    UpstreamData,
    DownstreamClose,
    UpstreamClose,
    Tick,
    QueueReady,
    HttpCallResponse,
    GrpcInitial,
    GrpcReceive,
    GrpcTrailing,
    GrpcClose,
    Log,
    Done,
    Delete,
}

impl Callback {
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Start => "start",
            Self::ContextCreate => "proxy_on_context_create",
            Self::VmStart => "proxy_on_vm_start",
            Self::Configure => "proxy_on_configure",
            Self::RequestHeaders => "proxy_on_request_headers",
            Self::RequestBody => "proxy_on_request_body",
            Self::RequestTrailers => "proxy_on_request_trailers",
            Self::ResponseHeaders => "proxy_on_response_headers",
            Self::ResponseBody => "proxy_on_response_body",
            Self::ResponseTrailers => "proxy_on_response_trailers",
            Self::NewConnection => "proxy_on_new_connection",
            Self::DownstreamData => "proxy_on_downstream_data",
            Self::UpstreamData => "proxy_on_upstream_data",
            Self::DownstreamClose => "proxy_on_downstream_connection_close",
            Self::UpstreamClose => "proxy_on_upstream_connection_close",
            Self::Tick => "proxy_on_tick",
            Self::QueueReady => "proxy_on_queue_ready",
            Self::HttpCallResponse => "proxy_on_http_call_response",
            Self::GrpcInitial => "proxy_on_grpc_receive_initial_metadata",
            Self::GrpcReceive => "proxy_on_grpc_receive",
            Self::GrpcTrailing => "proxy_on_grpc_receive_trailing_metadata",
            Self::GrpcClose => "proxy_on_grpc_close",
            Self::Log => "proxy_on_log",
            Self::Done => "proxy_on_done",
            Self::Delete => "proxy_on_delete",
        }
    }
}

impl Callback {
    /// Whether it brings what another service answered.
    pub(crate) fn is_delivery(self) -> bool {
        matches!(
            self,
            Self::HttpCallResponse
                | Self::GrpcInitial
                | Self::GrpcReceive
                | Self::GrpcTrailing
                | Self::GrpcClose
        )
    }
}

/// The context ids of the instance itself and of its one root.
pub(crate) const VM_CONTEXT: u32 = 0;
pub(crate) const ROOT_CONTEXT: u32 = 1;
