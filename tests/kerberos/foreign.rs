//! Programs of others that speak GSSAPI: curl and libcurl, which do no more than log in, and Dante.

use std::io::{Read as _, Write as _};
use std::net::SocketAddr;
use std::process::{Command, Output};

use crate::common::{Server, echo_server, is_installed, run, tcp_server, temp_dir};
use crate::kit::V4;
use crate::kit::realm::Realm;
use crate::peer::PYTHON;
use crate::{ALICE, LONG, client, realm, serve, session, stdout, text, url};

/// proxy and URL, then `nec` for that form of the level.
const PYCURL: &str = r#"
import io, sys, pycurl
proxy, url, *nec = sys.argv[1:]
c = pycurl.Curl()
body = io.BytesIO()
c.setopt(pycurl.URL, url)
c.setopt(pycurl.PROXY, proxy)
c.setopt(pycurl.PROXYTYPE, pycurl.PROXYTYPE_SOCKS5_HOSTNAME)
c.setopt(pycurl.NOPROXY, "")
c.setopt(267, 4)  # CURLOPT_SOCKS5_AUTH, CURLAUTH_GSSAPI
if nec:
    c.setopt(180, 1)  # CURLOPT_SOCKS5_GSSAPI_NEC
c.setopt(pycurl.WRITEDATA, body)
try:
    c.perform()
except pycurl.error as error:
    print("failed", *error.args)
    sys.exit()
print(body.getvalue().decode())
"#;

fn web_server() -> SocketAddr {
    tcp_server(V4, |mut stream| {
        let mut request = Vec::new();
        let mut octet = [0; 1];
        while !request.ends_with(b"\r\n\r\n") && stream.read(&mut octet).is_ok_and(|n| n > 0) {
            request.extend(octet);
        }
        let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 8\r\n\r\nit works");
    })
}

/// Whether others are still served.
fn assert_serves(realm: &Realm, server: &Server) {
    let args = ["--gssapi-min", "none", &echo_server().to_string()];
    assert_eq!(stdout(&mut client(realm, "connect", &url(server), &args), b"hello"), b"hello");
}

#[test]
fn libcurl_logs_in_where_nothing_is_protected_and_fails_cleanly_elsewhere() {
    let Some(realm) = realm() else { return };
    let folder = temp_dir();
    let mut pip = Command::new(PYTHON);
    pip.args(["-m", "pip", "install", "--quiet", "--no-cache-dir", "--disable-pip-version-check", "--retries", "1"]);
    pip.args(["--timeout", "5", "--only-binary", ":all:", "--target"]).arg(folder.path()).arg("pycurl>=7.46");
    // Not with skip: a machine without a network can do nothing about it.
    match pip.env("PIP_DEFAULT_TIMEOUT", "5").output() {
        Ok(output) if output.status.success() => {}
        other => {
            let why = other.map_or_else(|error| error.to_string(), |output| text(&output.stderr));
            return eprintln!("skipped: pycurl can't be had: {why}");
        }
    }
    let python = |script: &str| {
        let mut command = Command::new(PYTHON);
        command.args(["-c", script]).env("PYTHONPATH", folder.path());
        command
    };
    let script = "import pycurl; v = pycurl.version_info(); print(v[1], v[2] >= 0x081100 and bool(v[4] & 1 << 17))";
    let version = text(&stdout(&mut python(script), b""));
    if !version.ends_with("True\n") {
        return eprintln!("skipped: this libcurl is too old, or without GSSAPI: {version}");
    }
    let url_of = format!("http://{}/", web_server());
    let curl = |server: &Server, nec: &[&str]| {
        let mut command = python(PYCURL);
        realm.env(command.args([&url(server), &url_of]).args(nec));
        text(&stdout(&mut command, b""))
    };
    let server = serve(&realm, &["--gssapi-protection", "none"]);
    for nec in [&[][..], &["nec"]] {
        assert_eq!(curl(&server, nec), "it works\n", "{nec:?}");
    }
    session(&server, &[ALICE, "command=connect", "rep=0"]);
    let server = serve(&realm, &[]);
    for nec in [&[][..], &["nec"]] {
        let said = curl(&server, nec);
        assert!(said.starts_with("failed 97"), "{nec:?}: {said}");
    }
    // Its request in clear is no frame, and gets no answer.
    session(&server, &[ALICE, "command=- ", "rep=-"]);
    assert_serves(&realm, &server);
}

#[test]
fn debians_curl_gets_through_the_login_and_no_further() {
    let Some(realm) = realm() else { return };
    if !is_installed("curl") {
        return;
    }
    let page = format!("http://{}/", web_server());
    let curl = |server: &Server, more: &[&str]| -> Output {
        let mut command = Command::new("curl");
        let proxy = format!("socks5h://{}", url(server));
        command
            .args(["-sS", "--noproxy", "", "--max-time", "10", "-x", &proxy, "--socks5-gssapi"])
            .args(more)
            .arg(&page);
        run(realm.env(&mut command), b"", LONG)
    };
    let version = text(&stdout(Command::new("curl").arg("--version"), b""));
    if !version.contains("GSS-API") {
        return crate::common::skip("this curl has no GSSAPI");
    }
    for levels in ["none", "integrity,confidentiality"] {
        let server = serve(&realm, &["--gssapi-protection", levels]);
        for nec in [&[][..], &["--socks5-gssapi-nec"]] {
            let output = curl(&server, nec);
            let ended = output.status.code();
            // Versions from 8.17 on get it, where nothing is protected.
            let is_right = ended == Some(97) || levels == "none" && output.stdout == b"it works";
            assert!(is_right, "{levels}: {ended:?}: {}", text(&output.stderr));
        }
        assert_serves(&realm, &server);
    }
}

#[test]
fn a_stock_curl_logs_in_by_password_where_that_comes_first() {
    let Some(realm) = realm() else { return };
    if !is_installed("curl") {
        return;
    }
    let folder = temp_dir();
    let users = crate::path(&folder.path().join("users"));
    stdout(crate::common::s5().args(["serve", "--users", &users, "--add-user", "bob"]), b"secret\n");
    let server = serve(&realm, &["--users", &users]);
    let proxy = format!("socks5h://bob:secret@{}", url(&server));
    let mut command = Command::new("curl");
    command.args(["-sS", "--noproxy", "", "-x", &proxy, &format!("http://{}/", web_server())]);
    assert_eq!(stdout(realm.env(&mut command), b""), b"it works");
    session(&server, &["user=\"bob\"", "rep=0"]);
}
