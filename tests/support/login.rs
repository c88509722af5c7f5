//! Logins by user name and password (RFC 1929), from a chosen loopback address.

use std::sync::atomic::AtomicU16;

use argon2::password_hash::PasswordHasher as _;
use argon2::password_hash::phc::PasswordHash;
use argon2::{Algorithm, Argon2, Params, Version};

use super::*;

/// An entry of a users file: argon2id with the lowest cost, which takes microseconds.
pub fn user_line(name: &str, passwd: &str) -> String {
    let params = Params::new(8, 1, 1, None).expect("valid parameters");
    let argon2 = Argon2::new(Algorithm::Argon2id, Version::V0x13, params);
    let hash: PasswordHash = argon2.hash_password(passwd.as_bytes()).expect("password hashed");
    format!("{name}:{hash}\n")
}

/// An entry with bcrypt, whose CPU time can be measured: about a millisecond with cost 4, twice as much for each step.
pub fn bcrypt_line(name: &str, passwd: &str, cost: u32) -> String {
    format!("{name}:{}\n", bcrypt::hash(passwd, cost).expect("password hashed"))
}

/// Writes a users file.
pub fn users_file(list: &[(&str, &str)]) -> (TempDir, String) {
    let dir = temp_dir();
    let text: String = list.iter().map(|(name, passwd)| user_line(name, passwd)).collect();
    let path = write_file(dir.path(), "users", &text);
    (dir, path)
}

/// The login message of a client.
pub fn login_message(uname: &[u8], passwd: &[u8]) -> Vec<u8> {
    let length = |field: &[u8]| u8::try_from(field.len()).expect("at most 255 bytes");
    [&[1, length(uname)], uname, &[length(passwd)], passwd].concat()
}

/// Returns a loopback address that no client has used yet, because answers to an address are delayed after failed
/// logins.
pub fn unused_client_ip() -> IpAddr {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    let [high, low] = NEXT.fetch_add(1, Ordering::Relaxed).to_be_bytes();
    IpAddr::from([127, 1, high, low])
}

/// Connects from a loopback address.
pub fn connect_from_ip(server: &Server, source: impl Into<IpAddr>) -> TcpStream {
    connect_from(SocketAddr::new(source.into(), 0), server.addr())
}

/// Offers the method USERNAME/PASSWORD. Fails unless the server selects it.
pub fn select_password(stream: &mut TcpStream) {
    stream.write_all(&[5, 1, 2]).expect("greeting sent");
    assert_eq!(read_exact(stream, 2), [5, 2]);
}

/// Sends user name and password. Returns STATUS.
pub fn send_login(stream: &mut TcpStream, uname: &[u8], passwd: &[u8]) -> u8 {
    stream.write_all(&login_message(uname, passwd)).expect("login sent");
    let [1, status] = read_exact(stream, 2)[..] else { panic!("VER of the answer to a login") };
    status
}

/// Logs in from a loopback address. Returns the connection and STATUS.
pub fn log_in(server: &Server, source: impl Into<IpAddr>, uname: &[u8], passwd: &[u8]) -> (TcpStream, u8) {
    let mut stream = connect_from_ip(server, source);
    select_password(&mut stream);
    let status = send_login(&mut stream, uname, passwd);
    (stream, status)
}

/// Logs in from an unused address and sends a request. Returns the connection and REP.
pub fn open_with_login(
    server: &Server,
    (uname, passwd): (&str, &str),
    command: u8,
    dst: SocketAddr,
) -> (TcpStream, u8) {
    let (mut stream, status) = log_in(server, unused_client_ip(), uname.as_bytes(), passwd.as_bytes());
    assert_eq!(status, 0, "{uname}");
    stream.write_all(&request(command, dst)).expect("request sent");
    let (rep, _) = read_reply(&mut stream);
    (stream, rep)
}
