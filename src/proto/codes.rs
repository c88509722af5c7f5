//! The codes of RFC 1928 with their names, and recognition of other protocols by their first byte.

use std::fmt;
use std::str::FromStr;

/// An authentication method (RFC 1928 section 3).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Method(pub u8);

impl Method {
    /// NO AUTHENTICATION REQUIRED.
    pub const NONE: Self = Self(0);
    /// GSSAPI (RFC 1961).
    pub const GSSAPI: Self = Self(1);
    /// USERNAME/PASSWORD (RFC 1929).
    pub const PASSWORD: Self = Self(2);
    /// NO ACCEPTABLE METHODS.
    pub const NO_ACCEPTABLE: Self = Self(0xff);
}

impl fmt::Display for Method {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::NONE => f.write_str("none"),
            Self::GSSAPI => f.write_str("gssapi"),
            Self::PASSWORD => f.write_str("password"),
            Self::NO_ACCEPTABLE => f.write_str("no acceptable method"),
            Self(other) => write!(f, "method {other:#04x}"),
        }
    }
}

impl FromStr for Method {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        from_name(text, &[Self::NONE, Self::PASSWORD, Self::GSSAPI], "none, password or gssapi")
    }
}

/// Returns the value that is displayed as `text`.
pub(super) fn from_name<T: Copy + fmt::Display>(text: &str, all: &[T], expected: &str) -> Result<T, String> {
    let found = all.iter().find(|value| value.to_string() == text);
    found.copied().ok_or_else(|| format!("expected {expected}, found {text:?}"))
}

/// CMD (RFC 1928 section 4).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Command {
    /// The server connects to DST.
    Connect = 1,
    /// The server accepts one connection from DST.
    Bind = 2,
    /// The server relays UDP datagrams.
    UdpAssociate = 3,
}

impl Command {
    pub(super) const ALL: [Self; 3] = [Self::Connect, Self::Bind, Self::UdpAssociate];
}

impl fmt::Display for Command {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Connect => "connect",
            Self::Bind => "bind",
            Self::UdpAssociate => "udp",
        })
    }
}

impl FromStr for Command {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        from_name(text, &Self::ALL, "connect, bind or udp")
    }
}

/// REP, a reply code (RFC 1928 section 6).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Rep(pub u8);

macro_rules! reply_codes {
    ($($code:literal $name:ident $text:literal)*) => {
        impl Rep {
            $(#[doc = concat!("X'", stringify!($code), "': ", $text, ".")] pub const $name: Self = Self($code);)*
        }
        impl fmt::Display for Rep {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                match self.0 {
                    $($code => f.write_str($text),)*
                    _ => f.write_str("unassigned reply code"),
                }
            }
        }
    };
}

reply_codes! {
    0 SUCCEEDED "succeeded"
    1 GENERAL_FAILURE "general SOCKS server failure"
    2 NOT_ALLOWED "not allowed by ruleset"
    3 NETWORK_UNREACHABLE "network unreachable"
    4 HOST_UNREACHABLE "host unreachable"
    5 CONNECTION_REFUSED "connection refused"
    6 TTL_EXPIRED "TTL expired"
    7 COMMAND_NOT_SUPPORTED "command not supported"
    8 ATYP_NOT_SUPPORTED "address type not supported"
}

/// A protocol other than SOCKS5, identified by the first byte that the peer sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OtherProtocol(pub u8);

impl OtherProtocol {
    /// Returns a refusal in that protocol; empty if s5 has none.
    pub fn rejection(self) -> &'static [u8] {
        match self.0 {
            4 => &[0, 0x5b, 0, 0, 0, 0, 0, 0], // SOCKS4: request rejected
            b'S' => &[],                       // SSH
            b'A'..=b'Z' => {
                b"HTTP/1.0 501 Not Implemented\r\nContent-Type: text/plain\r\nConnection: close\r\n\r\n\
                  This is a SOCKS5 proxy, not an HTTP server or proxy. Use it as socks5h://HOST:PORT.\n"
            }
            _ => &[],
        }
    }
}

impl fmt::Display for OtherProtocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let guess = match self.0 {
            0 | 4 => ", SOCKS4?",
            0x15 | 0x16 => ", TLS?",
            b'S' => ", SSH?",
            b'A'..=b'Z' => ", HTTP?",
            _ => "",
        };
        match self.0 {
            byte if byte.is_ascii_graphic() => write!(f, "{byte:#04x} '{}'{guess}", char::from(byte)),
            byte => write!(f, "{byte:#04x}{guess}"),
        }
    }
}
