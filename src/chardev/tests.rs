//! Devices against clients on real sockets and files.

use std::fs;
use std::path::Path;

use stord_qmp::opts::Opts;
use stord_qmp::{Error, chardev_opts};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UnixStream};

use super::*;

fn run<T>(test: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime");
    tokio::task::LocalSet::new().block_on(&runtime, test)
}

/// Makes devices and becomes the user of the last one.
async fn add(chardevs: &Chardevs, text: &str) -> Result<User, Error> {
    let opts = Opts::parse(text, "backend")?;
    let id = opts.id.clone().expect("every test gives one");
    for options in chardev_opts::translate(opts)? {
        let setting = Setting {
            origin: &Origin::none(),
            daemonize: false,
            takes_descriptors: true,
            shutdown: &Shutdown::default(),
            credentials: &Arc::default(),
        };
        chardevs.add(options, setting).await?;
    }
    chardevs.get(&id)?.claim()
}

async fn exchange(connection: &mut Connection, peer: &mut (impl AsyncRead + AsyncWrite + Unpin)) {
    let mut bytes = [0; 4];
    peer.write_all(b"ping").await.expect("connected");
    connection
        .reader
        .read_exact(&mut bytes)
        .await
        .expect("connected");
    assert_eq!(&bytes, b"ping");
    connection
        .writer
        .write_all(b"pong")
        .await
        .expect("connected");
    peer.read_exact(&mut bytes).await.expect("connected");
    assert_eq!(&bytes, b"pong");
}

#[test]
fn server_serves_one_client_after_the_other() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("s");
    let text = format!("socket,id=a,path={},server=on,wait=off", path.display());
    run(async {
        let chardevs = Chardevs::default();
        let device = add(&chardevs, &text).await.expect("it can listen");
        let mut first = UnixStream::connect(&path).await.expect("it listens");
        let mut second = UnixStream::connect(&path).await.expect("it listens");
        let mut connection = device.connect().await;
        exchange(&mut connection, &mut first).await;
        drop(connection);
        assert_eq!(first.read(&mut [0]).await.expect("closed"), 0);
        exchange(&mut device.connect().await, &mut second).await;
        drop(device);
        drop(chardevs);
        assert!(!path.exists());
    });
}

#[test]
fn dead_daemon_s_socket_is_replaced_but_no_other_file() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("s");
    let text = format!("socket,id=a,path={},server=on,wait=off", path.display());
    drop(std::os::unix::net::UnixListener::bind(&path).expect("a free path"));
    run(async {
        add(&Chardevs::default(), &text)
            .await
            .expect("nobody listens");
        fs::write(&path, "precious").expect("writable");
        let error = add(&Chardevs::default(), &text)
            .await
            .err()
            .expect("it is a file");
        assert!(error.message.ends_with("Address already in use"), "{error}");
        assert_eq!(fs::read(&path).expect("it is there"), b"precious");
    });
}

#[test]
fn waiting_server_starts_with_its_client() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("s");
    let text = format!("socket,id=a,path={},server=on", path.display());
    run(async {
        let chardevs = Chardevs::default();
        let connect = async {
            loop {
                if let Ok(stream) = UnixStream::connect(&path).await {
                    return stream;
                }
                tokio::task::yield_now().await;
            }
        };
        let (device, mut client) = tokio::join!(add(&chardevs, &text), connect);
        let device = device.expect("the client came");
        exchange(&mut device.connect().await, &mut client).await;
    });
}

#[test]
fn end_of_the_daemon_ends_the_waiting() {
    let dir = tempfile::tempdir().expect("a directory");
    let text = format!("socket,id=a,path={}/s,server=on", dir.path().display());
    run(async {
        let opts = Opts::parse(&text, "backend").expect("well-formed");
        let mut devices = chardev_opts::translate(opts).expect("well-formed");
        let shutdown = Shutdown::default();
        let setting = Setting {
            origin: &Origin::none(),
            daemonize: false,
            takes_descriptors: true,
            shutdown: &shutdown,
            credentials: &Arc::default(),
        };
        let chardevs = Chardevs::default();
        let add = chardevs.add(devices.remove(0), setting);
        let (added, ()) = tokio::join!(add, async { shutdown.request() });
        added.expect("no failure");
    });
}

#[test]
fn tcp_server_and_client_meet() {
    run(async {
        let chardevs = Chardevs::default();
        let text = "socket,id=s,host=127.0.0.1,port=0,server=on,wait=off,nodelay=on";
        let server = add(&chardevs, text).await.expect("a free port");
        let description = server.device().backend().filename();
        let port = description
            .strip_prefix("disconnected:tcp:127.0.0.1:")
            .and_then(|rest| rest.strip_suffix(",server=on"))
            .expect("the reference's notation");
        let text = format!("socket,id=c,host=127.0.0.1,port={port}");
        let client = add(&chardevs, &text).await.expect("the server listens");
        let mut theirs = client.connect().await;
        let mut ours = server.connect().await;
        ours.writer.write_all(b"hello").await.expect("connected");
        let mut bytes = [0; 5];
        theirs
            .reader
            .read_exact(&mut bytes)
            .await
            .expect("connected");
        assert_eq!(&bytes, b"hello");
        let taken = format!("socket,id=t,host=127.0.0.1,port={port},server=on,wait=off");
        let error = add(&chardevs, &taken).await.err().expect("it is taken");
        assert_eq!(
            error.message,
            "Failed to find an available port: Address already in use"
        );
        let next = format!("{taken},to=65535");
        let next = next.replace("id=t", "id=n");
        add(&chardevs, &next).await.expect("one of them is free");
        drop(TcpStream::connect(("127.0.0.1", port.parse().expect("a port"))).await);
    });
}

#[test]
fn client_without_a_server_is_refused() {
    run(async {
        let chardevs = Chardevs::default();
        let error = add(&chardevs, "socket,id=a,path=/nonexistent/s").await;
        assert_eq!(
            error.err().expect("nobody listens").message,
            "Failed to connect to '/nonexistent/s': No such file or directory"
        );
    });
}

#[test]
fn file_takes_output_and_gives_input() {
    let dir = tempfile::tempdir().expect("a directory");
    let at = |name: &str| dir.path().join(name);
    let read = |path: &Path| fs::read_to_string(path).expect("it is there");
    fs::write(at("in"), "question").expect("writable");
    fs::write(at("out"), "old").expect("writable");
    let dir = dir.path().display();
    run(async {
        let chardevs = Chardevs::default();
        let text = format!("file,id=a,path={dir}/out,input-path={dir}/in");
        let device = add(&chardevs, &text).await.expect("both can be opened");
        let mut connection = device.connect().await;
        let mut input = String::new();
        connection
            .reader
            .read_to_string(&mut input)
            .await
            .expect("readable");
        assert_eq!(input, "question");
        connection
            .writer
            .write_all(b"answer")
            .await
            .expect("writable");
        connection.writer.flush().await.expect("writable");
        assert_eq!(read(&at("out")), "answer");
        let text = format!("file,id=b,path={dir}/out,append=on");
        let device = add(&chardevs, &text).await.expect("it can be opened");
        let mut connection = device.connect().await;
        connection.writer.write_all(b"s").await.expect("writable");
        connection.writer.flush().await.expect("writable");
        assert_eq!(read(&at("out")), "answers");
    });
}

#[test]
fn ids_are_unique_and_devices_have_one_user() {
    run(async {
        let chardevs = Chardevs::default();
        let device = add(&chardevs, "null,id=a").await.expect("a device");
        let error = add(&chardevs, "null,id=a")
            .await
            .err()
            .expect("it is taken");
        assert_eq!(
            error.message,
            "attempt to add duplicate property 'a' to object (type 'container')"
        );
        let again = || chardevs.get("a").and_then(|device| device.claim());
        let error = again().err().expect("it is taken");
        assert_eq!(error.message, "chardev 'a' is already in use");
        drop(device);
        drop(again().expect("it is free"));
        let error = chardevs.get("b").err().expect("there is none");
        assert_eq!(error.message, "chardev \"b\" not found");
    });
}

async fn say(connection: &mut Connection, text: &str) {
    let written = connection.writer.write_all(text.as_bytes()).await;
    written.expect("connected");
    connection.writer.flush().await.expect("connected");
}

async fn hear(reader: &mut (impl AsyncRead + Unpin), expected: &str) {
    let mut bytes = vec![0; expected.len()];
    reader.read_exact(&mut bytes).await.expect("connected");
    assert_eq!(String::from_utf8_lossy(&bytes), expected);
}

#[test]
fn users_of_a_multiplexer_are_switched_by_its_client() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("s");
    let text = format!(
        "socket,id=m,path={},server=on,wait=off,mux=on",
        path.display()
    );
    run(async {
        let chardevs = Chardevs::default();
        let first = add(&chardevs, &text).await.expect("it can listen");
        let second = chardevs.get("m").and_then(|device| device.claim());
        let second = second.expect("it has room");
        let busy = chardevs.get("m-base").and_then(|device| device.claim());
        assert!(busy.is_err_and(|error| error.message == "chardev 'm-base' is already in use"));
        for text in ["once", "again"] {
            let mut client = UnixStream::connect(&path).await.expect("it listens");
            let (mut one, mut two) = (first.connect().await, second.connect().await);
            say(&mut one, &format!("{text} one\n")).await;
            hear(&mut client, &format!("{text} one\n")).await;
            say(&mut two, "half a ").await;
            say(&mut one, "one\n").await;
            say(&mut two, "line\n").await;
            hear(&mut client, "half a line\none\n").await;
            client
                .write_all(b"2\x01c1\x01\x01\x01c2")
                .await
                .expect("connected");
            hear(&mut two.reader, "22").await;
            hear(&mut one.reader, "1\x01").await;
            client.write_all(b"\x01h").await.expect("connected");
            hear(&mut client, "\n\rC-a h    print this help\n\r").await;
            drop(client);
            assert_eq!(one.reader.read(&mut [0]).await.expect("an end"), 0);
            assert_eq!(two.reader.read(&mut [0]).await.expect("an end"), 0);
        }
        let more = [(); 3].map(|()| chardevs.get("m").and_then(|device| device.claim()));
        let refused = more.into_iter().next_back().and_then(Result::err);
        assert_eq!(
            refused.map(|error| error.message).as_deref(),
            Some("too many uses of multiplexed chardev 'm' (maximum is 4)")
        );
    });
}

#[test]
fn hub_joins_devices() {
    let dir = tempfile::tempdir().expect("a directory");
    let at = |name: &str| dir.path().join(name);
    run(async {
        let chardevs = Chardevs::default();
        for name in ["a", "b"] {
            let path = at(name);
            let text = format!(
                "socket,id={name},path={},server=on,wait=off",
                path.display()
            );
            drop(add(&chardevs, &text).await.expect("it can listen"));
        }
        drop(
            add(&chardevs, "ringbuf,id=r,size=16")
                .await
                .expect("a buffer"),
        );
        let text = "hub,id=h,chardevs.0=a,chardevs.1=b,chardevs.2=r";
        let hub = add(&chardevs, text).await.expect("they are free");
        assert!(
            chardevs
                .remove("a")
                .is_err_and(|error| error.message == "Chardev 'a' is busy")
        );
        let mut connection = hub.connect().await;
        let mut a = UnixStream::connect(at("a")).await.expect("it listens");
        let mut b = UnixStream::connect(at("b")).await.expect("it listens");
        for client in [&mut a, &mut b] {
            client.write_all(b"ping").await.expect("connected");
            hear(&mut connection.reader, "ping").await;
        }
        say(&mut connection, "to all").await;
        hear(&mut a, "to all").await;
        hear(&mut b, "to all").await;
        let arguments = stord_qmp::schema::chardev::RingbufRead {
            device: "r".to_owned(),
            size: 100,
            format: None,
        };
        assert_eq!(
            ringbuf::read(&chardevs, &arguments).as_deref(),
            Ok("to all")
        );
        drop(a);
        say(&mut connection, "!").await;
        hear(&mut b, "!").await;
    });
}

#[test]
fn client_connects_again_and_again() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("s");
    let text = format!("socket,id=a,path={},reconnect-ms=10", path.display());
    run(async {
        let chardevs = Chardevs::default();
        let device = add(&chardevs, &text).await.expect("it need not be there");
        let filename = || device.device().backend().filename();
        assert_eq!(filename(), format!("disconnected:unix:{}", path.display()));
        for _ in 0..2 {
            let listener = tokio::net::UnixListener::bind(&path).expect("a free path");
            let (mut connection, accepted) = tokio::join!(device.connect(), listener.accept());
            let (mut peer, _) = accepted.expect("it connects");
            exchange(&mut connection, &mut peer).await;
            assert_eq!(filename(), format!("unix:{}", path.display()));
            fs::remove_file(&path).expect("it is there");
        }
    });
}

#[test]
fn pseudo_terminal_is_connected_while_it_is_open() {
    let dir = tempfile::tempdir().expect("a directory");
    let link = dir.path().join("terminal");
    let text = format!("pty,id=p,path={}", link.display());
    run(async {
        let chardevs = Chardevs::default();
        let device = add(&chardevs, &text).await.expect("a terminal");
        for _ in 0..2 {
            let mut terminal = tokio::fs::OpenOptions::new();
            let terminal = terminal.read(true).write(true).open(&link);
            let mut terminal = terminal.await.expect("a terminal");
            let mut connection = device.connect().await;
            terminal.write_all(b"ping\n").await.expect("open");
            terminal.flush().await.expect("open");
            hear(&mut connection.reader, "ping\n").await;
            say(&mut connection, "pong\n").await;
            hear(&mut terminal, "pong\n").await;
            drop(terminal);
            assert_eq!(connection.reader.read(&mut [0]).await.expect("an end"), 0);
        }
        let again = add(&chardevs, &text.replace("id=p", "id=q")).await;
        let message = again.err().expect("the link is there").message;
        assert_eq!(message, "Failed to create PTY symlink: File exists");
        drop(device);
        chardevs.clear();
        assert!(!link.is_symlink());
    });
}

#[test]
fn datagrams_go_both_ways() {
    run(async {
        let peer = tokio::net::UdpSocket::bind("127.0.0.1:0")
            .await
            .expect("a port");
        let port = peer.local_addr().expect("an address").port();
        let chardevs = Chardevs::default();
        let text = format!("udp,id=u,host=127.0.0.1,port={port},localaddr=127.0.0.1");
        let device = add(&chardevs, &text).await.expect("a socket");
        let mut connection = device.connect().await;
        say(&mut connection, "one datagram").await;
        let mut bytes = [0; 100];
        let (count, from) = peer.recv_from(&mut bytes).await.expect("it came");
        assert_eq!(bytes.get(..count), Some(&b"one datagram"[..]));
        peer.send_to(b"longer than what is read at once", from)
            .await
            .expect("it is there");
        hear(&mut connection.reader, "longer").await;
        hear(&mut connection.reader, " than what is read at once").await;
    });
}

#[test]
fn log_has_what_was_written() {
    let dir = tempfile::tempdir().expect("a directory");
    let log = dir.path().join("log");
    run(async {
        for text in ["one", "two"] {
            let chardevs = Chardevs::default();
            let append = if text == "two" { "on" } else { "off" };
            let text_of = format!("null,id=n,logfile={},logappend={append}", log.display());
            let device = add(&chardevs, &text_of).await.expect("a device");
            say(&mut device.connect().await, text).await;
        }
        assert_eq!(fs::read_to_string(&log).expect("it is there"), "onetwo");
    });
}

#[test]
fn telnet_client_sees_the_options_and_is_not_seen_to_answer() {
    run(async {
        let chardevs = Chardevs::default();
        let text = "socket,id=s,host=127.0.0.1,port=0,server=on,wait=off,telnet=on";
        let server = add(&chardevs, text).await.expect("a free port");
        let filename = server.device().backend().filename();
        let port = filename
            .rsplit([':', ','])
            .nth(1)
            .expect("the port before the role");
        let port: u16 = port.parse().expect("a number");
        let mut client = TcpStream::connect(("127.0.0.1", port))
            .await
            .expect("it listens");
        let mut connection = server.connect().await;
        let mut greeting = [0; 12];
        client.read_exact(&mut greeting).await.expect("connected");
        assert_eq!(
            greeting,
            [255, 251, 1, 255, 251, 3, 255, 251, 0, 255, 253, 0]
        );
        let answers = [255, 253, 1, b'a', 255, 255, b'b'];
        client.write_all(&answers).await.expect("connected");
        let mut bytes = [0; 3];
        connection
            .reader
            .read_exact(&mut bytes)
            .await
            .expect("connected");
        assert_eq!(bytes, [b'a', 255, b'b']);
        let filename = server.device().backend().filename();
        assert!(filename.starts_with("telnet:127.0.0.1:") && filename.contains(",server=on <-> "));
    });
}

#[test]
fn socket_passed_by_number_is_used() {
    use std::os::fd::AsRawFd;
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("s");
    run(async {
        let chardevs = Chardevs::default();
        let listener = std::os::unix::net::UnixListener::bind(&path).expect("a free path");
        let number = listener.as_raw_fd();
        let text = format!("socket,id=a,fd={number},server=on,wait=off");
        let device = add(&chardevs, &text).await.expect("it listens");
        let mut client = UnixStream::connect(&path).await.expect("it listens");
        exchange(&mut device.connect().await, &mut client).await;
        for (text, message) in [
            (
                "socket,id=b,fd=1000000,server=on,wait=off",
                "File descriptor '1000000' is not a socket",
            ),
            (
                "socket,id=b,fd=x,server=on,wait=off",
                "Unable to parse FD number x",
            ),
        ] {
            let error = add(&chardevs, text).await.err().expect("it is no socket");
            assert_eq!(error.message, message);
        }
    });
}
