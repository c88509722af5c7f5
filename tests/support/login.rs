//! Logins by user name and password (RFC 1929), from a chosen loopback address.

use std::io::Write as _;
use std::net::{Ipv4Addr, SocketAddr, TcpStream};

use tempfile::TempDir;

use super::connect_from;
use crate::support::{Server, read_exact, temp_dir, write_file};

/// Writes a users file with bcrypt's lowest cost, since debug builds are slow.
pub fn users_file(list: &[(&str, &str)]) -> (TempDir, String) {
    users_file_with_cost(4, list)
}

pub fn users_file_with_cost(cost: u32, list: &[(&str, &str)]) -> (TempDir, String) {
    let line =
        |(name, passwd): &(&str, &str)| format!("{name}:{}\n", bcrypt::hash(passwd, cost).expect("password hashed"));
    let dir = temp_dir();
    let path = write_file(dir.path(), "users", &list.iter().map(line).collect::<String>());
    (dir, path)
}

/// The login message of a client.
pub fn login_message(uname: &[u8], passwd: &[u8]) -> Vec<u8> {
    let length = |field: &[u8]| u8::try_from(field.len()).expect("at most 255 bytes");
    [&[1, length(uname)], uname, &[length(passwd)], passwd].concat()
}

/// Connects from a loopback address.
pub fn connect_from_ip(server: &Server, source: [u8; 4]) -> TcpStream {
    connect_from(SocketAddr::from((Ipv4Addr::from(source), 0)), server.addr())
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
pub fn log_in(server: &Server, source: [u8; 4], uname: &[u8], passwd: &[u8]) -> (TcpStream, u8) {
    let mut stream = connect_from_ip(server, source);
    select_password(&mut stream);
    let status = send_login(&mut stream, uname, passwd);
    (stream, status)
}
