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
    runtime.block_on(test)
}

async fn add(chardevs: &mut Chardevs, text: &str) -> Result<Rc<Chardev>, Error> {
    let options = chardev_opts::translate(Opts::parse(text, "backend")?)?;
    let id = options.id.clone();
    let setting = Setting {
        origin: &Origin::none(),
        daemonize: false,
        shutdown: &Shutdown::default(),
    };
    chardevs.add(options, setting).await?;
    chardevs.get(&id)
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
        let mut chardevs = Chardevs::default();
        let device = add(&mut chardevs, &text).await.expect("it can listen");
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
        add(&mut Chardevs::default(), &text)
            .await
            .expect("nobody listens");
        fs::write(&path, "precious").expect("writable");
        let error = add(&mut Chardevs::default(), &text)
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
        let mut chardevs = Chardevs::default();
        let connect = async {
            loop {
                if let Ok(stream) = UnixStream::connect(&path).await {
                    return stream;
                }
                tokio::task::yield_now().await;
            }
        };
        let (device, mut client) = tokio::join!(add(&mut chardevs, &text), connect);
        let device = device.expect("the client came");
        exchange(&mut device.connect().await, &mut client).await;
    });
}

#[test]
fn end_of_the_daemon_ends_the_waiting() {
    let dir = tempfile::tempdir().expect("a directory");
    let text = format!("socket,id=a,path={}/s,server=on", dir.path().display());
    run(async {
        let options = chardev_opts::translate(Opts::parse(&text, "backend").expect("well-formed"));
        let shutdown = Shutdown::default();
        let setting = Setting {
            origin: &Origin::none(),
            daemonize: false,
            shutdown: &shutdown,
        };
        let mut chardevs = Chardevs::default();
        let add = chardevs.add(options.expect("well-formed"), setting);
        let (added, ()) = tokio::join!(add, async { shutdown.request() });
        added.expect("no failure");
    });
}

#[test]
fn tcp_server_and_client_meet() {
    run(async {
        let mut chardevs = Chardevs::default();
        let text = "socket,id=s,host=127.0.0.1,port=0,server=on,wait=off,nodelay=on";
        let server = add(&mut chardevs, text).await.expect("a free port");
        let Backend::Server(listening) = &server.backend else {
            panic!("it is a server");
        };
        let description = listening.description().to_owned();
        let port = description
            .strip_prefix("tcp:127.0.0.1:")
            .and_then(|rest| rest.strip_suffix(",server=on"))
            .expect("the reference's notation");
        let text = format!("socket,id=c,host=127.0.0.1,port={port}");
        let client = add(&mut chardevs, &text).await.expect("the server listens");
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
        let error = add(&mut chardevs, &taken).await.err().expect("it is taken");
        assert_eq!(
            error.message,
            "Failed to find an available port: Address already in use"
        );
        let next = format!("{taken},to=65535");
        let next = next.replace("id=t", "id=n");
        add(&mut chardevs, &next)
            .await
            .expect("one of them is free");
        drop(TcpStream::connect(("127.0.0.1", port.parse().expect("a port"))).await);
    });
}

#[test]
fn client_without_a_server_is_refused() {
    run(async {
        let mut chardevs = Chardevs::default();
        let error = add(&mut chardevs, "socket,id=a,path=/nonexistent/s").await;
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
        let mut chardevs = Chardevs::default();
        let text = format!("file,id=a,path={dir}/out,input-path={dir}/in");
        let device = add(&mut chardevs, &text).await.expect("both can be opened");
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
        let device = add(&mut chardevs, &text).await.expect("it can be opened");
        let mut connection = device.connect().await;
        connection.writer.write_all(b"s").await.expect("writable");
        connection.writer.flush().await.expect("writable");
        assert_eq!(read(&at("out")), "answers");
    });
}

#[test]
fn ids_are_unique_and_devices_have_one_user() {
    run(async {
        let mut chardevs = Chardevs::default();
        let device = add(&mut chardevs, "null,id=a").await.expect("a device");
        let error = add(&mut chardevs, "null,id=a")
            .await
            .err()
            .expect("it is taken");
        assert_eq!(
            error.message,
            "attempt to add duplicate property 'a' to object (type 'container')"
        );
        device.claim().expect("it is free");
        let error = device.claim().expect_err("it is taken");
        assert_eq!(error.message, "chardev 'a' is already in use");
        let error = chardevs.get("b").err().expect("there is none");
        assert_eq!(error.message, "chardev \"b\" not found");
    });
}
