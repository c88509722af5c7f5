//! Time limits: -w, --connect-timeout, -i and -m in every mode. --linger is tested in `remote_end.rs`.

use crate::bind::bound_address;
use crate::netcat::forward::start_forward;
use crate::*;

/// A target that answers a line, and is silent then.
fn silent_target() -> SocketAddr {
    tcp_server(V4, |mut stream| {
        let _ = stream.write_all(b"220\n");
        let _ = stream.read_to_end(&mut Vec::new());
        std::thread::sleep(TIMEOUT);
    })
}

/// Fails unless the client exits with 28, and its only message on stderr ends with `reason`.
fn assert_times_out(client: &mut RunningProgram, reason: &str) {
    let (status, _, stderr) = client.wait_exit(TIMEOUT);
    assert_eq!(status.code(), Some(28), "{stderr}");
    assert!(stderr.ends_with(&format!("{reason}\n")), "{stderr:?} does not end with {reason:?}");
}

#[test]
fn timeout_is_an_idle_timeout_too() {
    let ((_server, proxy), target) = (serve(), silent_target());
    let clients = ["--direct".into(), format!("-x {proxy}")].map(|route| {
        let mut client = start(&format!("connect -w 1s {route} {target}"));
        client.write(b"QUIT\n");
        client.close_stdin();
        client
    });
    let program = RunningProgram::start(command(&format!("connect -w 1s -x {proxy} {target} -c")).arg("cat"));
    let (forward, at) = start_forward(&format!("connect -w 1s -l 0 -x {proxy} {target}"));
    let _local = TcpStream::connect(at).expect("the listener accepts");
    let mut bind = start(&format!("bind -w 1s -x {proxy}"));
    let _peer = TcpStream::connect(bound_address(&bind)).expect("the listener accepts");
    for mut client in clients.into_iter().chain([program, forward]) {
        assert_times_out(&mut client, &format!("transfer, for {target}: idle for 1s"));
    }
    assert_times_out(&mut bind, "idle for 1s");
    // With udp, it ends an open stdin. After the end of stdin, it limits the wait for answers, which may all have come.
    let echo = udp_echo_server(V4);
    let mut client = start(&format!("udp -w 1s -x {proxy} {echo}"));
    client.write(b"one\n");
    assert_times_out(&mut client, &format!("transfer, for {echo}: idle for 1s"));
    assert_eq!(outcome(&format!("udp -w 1s -x {proxy} {echo}"), b"one\n"), success("one\n"));
}

#[test]
fn connect_timeout_does_not_limit_idleness_and_idle_timeout_not_connecting() {
    let silent = ScriptedServer::start("> ...");
    let started = Instant::now();
    let mut client = start(&format!("connect --connect-timeout 300ms -i 9 -w 9 -x {} {TARGET}", silent.addr));
    assert_times_out(&mut client, &format!("greeting, for {TARGET}: timed out after 300ms"));
    assert!(started.elapsed() < Duration::from_secs(8));
    let slow =
        "> {greeting}; pause 200ms; < 05 00; > {request}; pause 200ms; < 05 00 00 01 00*6; pause 200ms; < \"late\"";
    let options = ["-i 2s", "-i 2s --connect-timeout 5s", "-w 2s -i 5s", "-w 300ms --connect-timeout 5s -i 5s"];
    run_all(options.to_vec(), |options| {
        let proxy = ScriptedServer::start(slow);
        let args = format!("connect {options} -x {} {TARGET}", proxy.addr);
        assert_eq!(outcome(&args, b""), success("late"), "{options}");
    });
    // -i alone begins after the reply.
    let proxy = ScriptedServer::start("> {greeting}; pause 500ms; < 05 00; > {request}; < 05 00 00 01 00*6; < \"x\"");
    assert_eq!(outcome(&format!("connect -i 250ms -x {} {TARGET}", proxy.addr), b""), success("x"));
    // The wait for the peer of bind is part of connecting.
    let (_server, proxy) = serve();
    assert_times_out(
        &mut start(&format!("bind --connect-timeout 300ms -x {proxy}")),
        "waiting for the peer: timed out after 300ms",
    );
}

#[test]
fn max_time_limits_every_phase_of_every_mode() {
    let ((_server, proxy), target) = (serve(), silent_target());
    let flood = tcp_server(V4, |mut stream| while stream.write_all(&[b'x'; 4096]).is_ok() {});
    let silent = || ScriptedServer::start("> ...").addr;
    let echo = udp_echo_server(V4);
    let lines = vec![
        (format!("connect -m 1s -x {} {TARGET}", silent()), format!("greeting, for {TARGET}: timed out after 1s")),
        (format!("connect --max-time 1s --retry 9 -x {} {TARGET}", silent()), "timed out after 1s".into()),
        (format!("connect -m 1s --retry 9 -x {} {TARGET}", closed_port()), " attempts)".into()),
        (format!("connect -m 1s -x {proxy} {target}"), format!("transfer, for {target}: timed out after 1s")),
        (format!("connect -m 1s -x {proxy} {target} -e cat"), "timed out after 1s".into()),
        (format!("connect -m 1s -l 0 -x {proxy} {target}"), "timed out after 1s".into()),
        (format!("connect -m 1s -l 0 -k -x {proxy} {target}"), "timed out after 1s".into()),
        (format!("bind -m 1s -x {proxy}"), "waiting for the peer: timed out after 1s".into()),
        (format!("udp -m 1s -i 9 -x {proxy} {echo}"), format!("transfer, for {echo}: timed out after 1s")),
        (format!("udp -m 1s -l 0 -x {proxy} {echo}"), "timed out after 1s".into()),
    ];
    run_all(lines, |(line, reason)| {
        let started = Instant::now();
        assert_times_out(&mut start(&line), &reason);
        assert!(started.elapsed() >= Duration::from_millis(950), "{line}");
    });
    // Alone, as it uses all cores.
    let mut flooded = command(&format!("connect -m 1s -i 9 -x {proxy} {flood}"));
    let mut flooded = RunningProgram::start_with(&mut flooded, Stdio::null(), |_| false);
    assert_times_out(&mut flooded, &format!("transfer, for {flood}: timed out after 1s"));
    assert_eq!(outcome(&format!("connect -m 10 -x {proxy} {}", crate::support::echo_server()), b"x"), success("x"));
    for option in ["-m", "--connect-timeout", "-i"] {
        crate::assert_line(&format!("connect {option} 0 {TARGET}"), 2, &[option, "greater than 0"]);
    }
}

#[test]
fn max_time_has_a_json_object_with_the_bytes_so_far() {
    let ((_server, proxy), target) = (serve(), silent_target());
    run_all(vec!["", " -l 0 -v"], |options| {
        let mut client = start(&format!("connect -m 2s --json{options} -x {proxy} {target}"));
        if !options.is_empty() {
            let stderr = client.stderr(|stderr| stderr.contains("listening on ") && stderr.ends_with('\n'));
            let at = stderr.trim().rsplit(' ').next().unwrap_or_default().to_owned();
            let mut local = TcpStream::connect(at).expect("the listener accepts");
            local.read_exact(&mut [0; 4]).expect("data received");
        }
        let (_, _, stderr) = client.wait_exit(TIMEOUT);
        let object = stderr.lines().last().unwrap_or_default();
        let parts = ["\"down\":4,", "\"phase\":\"transfer\"", "\"status\":28", "timed out after 2s"];
        assert!(parts.iter().all(|part| object.contains(part)), "{stderr}");
    });
}
