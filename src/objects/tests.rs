//! Objects as clients make, change and remove them.

use serde_json::json;
use stord_qmp::schema::object::QCryptoTLSCredsEndpoint;

use super::tree::Tree;

use super::*;
use crate::chardev::Chardevs;

/// Runs a test with no objects, on a runtime as the daemon's.
fn with_objects(test: impl AsyncFnOnce(&Objects)) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime");
    let contexts = Rc::new(Contexts::start().expect("a context can be started"));
    let objects = Objects::new(contexts);
    tokio::task::LocalSet::new().block_on(&runtime, test(&objects));
}

async fn add(objects: &Objects, text: &str) -> Result<(), String> {
    let options = stord_qmp::from_keyval(text, Some("qom-type")).map_err(|e| e.message)?;
    objects.add(options).await.map_err(|error| error.message)
}

async fn must_add(objects: &Objects, text: &str) {
    assert_eq!(add(objects, text).await, Ok(()), "{text}");
}

fn tree_of<T>(objects: &Objects, look: impl FnOnce(&Tree<'_>) -> T) -> T {
    let chardevs = &Chardevs::default();
    look(&Tree { objects, chardevs })
}

fn get(objects: &Objects, path: &str, property: &str) -> Result<Value, String> {
    tree_of(objects, |tree| tree.get(path, property)).map_err(|error| error.message)
}

fn set(objects: &Objects, path: &str, property: &str, value: Value) -> Result<(), String> {
    tree_of(objects, |tree| tree.set(path, property, value)).map_err(|error| error.message)
}

/// One of each type that needs nothing from the machine.
const SAMPLES: &[&str] = &[
    "authz-list,id=list,policy=allow,rules.0.match=fred,rules.0.policy=deny",
    "authz-simple,id=simple,identity=fred",
    "iothread,id=thread",
    "main-loop,id=loop",
    "secret,id=secret,data=hallo",
    "thread-context,id=context",
    "tls-creds-anon,id=anon",
];

#[test]
fn iothreads_come_and_go() {
    with_objects(async |objects| {
        must_add(objects, "iothread,id=t0,poll-max-ns=5").await;
        let again = add(objects, "iothread,id=t0").await;
        assert!(again.is_err_and(|message| message.contains("duplicate")));
        objects.contexts.acquire("t0").expect("it is there");
        let used = objects.del("t0");
        assert!(used.is_err_and(|error| error.message.contains("in use")));
        objects.contexts.release("t0");
        objects.del("t0").expect("nobody uses it");
        let gone = objects.del("t0");
        assert!(gone.is_err_and(|error| error.message.contains("not found")));
    });
}

#[test]
fn properties_out_of_range_are_refused() {
    with_objects(async |objects| {
        for (text, message) in [
            (
                "iothread,id=a,poll-max-ns=-1",
                "poll-max-ns value must be in range [0, 9223372036854775807]",
            ),
            (
                "iothread,id=a,thread-pool-max=0",
                "bad thread-pool-min/thread-pool-max values",
            ),
            ("iothread,id=1", "Parameter 'id' expects an identifier"),
            (
                "nope,id=a",
                "Parameter 'qom-type' does not accept value 'nope'",
            ),
            ("iothread,id=a,foo=1", "Parameter 'foo' is unexpected"),
            ("iothread", "Parameter 'id' is missing"),
            ("secret,id=a", "Either 'file' or 'data' must be provided"),
            (
                "secret,id=a,file=x,data=y",
                "'file' and 'data' are mutually exclusive",
            ),
            (
                "secret,id=a,data=x,keyid=a",
                "Secret with id 'a' has no data",
            ),
            (
                "thread-context,id=a,cpu-affinity.0=0,node-affinity.0=0",
                "Mixing CPU and node affinity not supported",
            ),
            (
                "secret,id=type,data=x",
                "attempt to add duplicate property 'type' to object (type 'container')",
            ),
        ] {
            assert_eq!(add(objects, text).await, Err(message.to_owned()), "{text}");
        }
        assert_eq!(
            tree_of(objects, |tree| tree.list("/objects")).map(|list| list.len()),
            Ok(1)
        );
    });
}

#[test]
fn there_is_one_main_loop() {
    with_objects(async |objects| {
        must_add(objects, "main-loop,id=m").await;
        assert_eq!(
            add(objects, "main-loop,id=n").await,
            Err("only one main-loop instance allowed".to_owned())
        );
        assert!(objects.del("m").is_err());
    });
}

#[test]
fn every_property_that_is_listed_is_there() {
    with_objects(async |objects| {
        for sample in SAMPLES {
            must_add(objects, sample).await;
        }
        for (id, object) in objects.all() {
            let path = format!("/objects/{id}");
            for property in object.class().all_properties() {
                let name = property.name;
                let value = get(objects, &path, name);
                assert_eq!(
                    value.is_ok(),
                    property.is_readable(),
                    "{path} {name}: {value:?}"
                );
                if let (Ok(value), true) = (value, property.is_writable()) {
                    assert_eq!(
                        set(objects, &path, name, value.clone()),
                        Ok(()),
                        "{path} {name}"
                    );
                    assert_eq!(get(objects, &path, name), Ok(value), "{path} {name}");
                }
                let wrong = set(objects, &path, name, json!({"no": "such"}));
                assert!(wrong.is_err(), "{path} {name}");
            }
        }
    });
}

#[test]
fn polling_of_a_running_iothread_is_changed() {
    with_objects(async |objects| {
        must_add(objects, "iothread,id=t,poll-max-ns=5").await;
        let path = "/objects/t";
        assert_eq!(set(objects, path, "poll-max-ns", json!(7)), Ok(()));
        let context = objects.contexts.acquire("t").expect("it is there");
        assert_eq!(context.polling().max_ns, 7);
        assert!(set(objects, path, "poll-grow", json!(-1)).is_err());
        assert_eq!(
            set(objects, path, "poll-grow", json!("1")),
            Err("Invalid parameter type for 'poll-grow', expected: integer".to_owned())
        );
    });
}

#[test]
fn paths_may_be_partial_unless_ambiguous() {
    with_objects(async |objects| {
        must_add(objects, "secret,id=s,data=x").await;
        for path in ["/objects/s", "objects/s", "s", "//objects//s/"] {
            assert_eq!(get(objects, path, "type"), Ok(json!("secret")), "{path}");
        }
        assert_eq!(get(objects, "/", "objects"), Ok(json!("/objects")));
        assert_eq!(get(objects, "objects", "s"), Ok(json!("/objects/s")));
        must_add(objects, "secret,id=objects,data=x").await;
        assert_eq!(
            get(objects, "objects", "type"),
            Err("Path 'objects' is ambiguous".to_owned())
        );
        for path in ["/nope", "nope", "/objects/s/data"] {
            let error =
                tree_of(objects, |tree| tree.list(path)).expect_err("there is no such object");
            assert_eq!(error.class, stord_qmp::ErrorClass::DeviceNotFound);
            assert_eq!(error.message, format!("Device '{path}' not found"));
        }
        for property in ["s", "type"] {
            assert_eq!(
                set(objects, "/objects", property, json!("x")),
                Err(format!("Property 'container.{property}' is not writable"))
            );
        }
    });
}

#[test]
fn secret_is_found_until_it_is_deleted() {
    with_objects(async |objects| {
        must_add(objects, "secret,id=s,data=aGFsbG8=,format=base64").await;
        let text = objects.credentials.secret_text("s");
        assert_eq!(text.as_deref(), Ok("hallo"));
        objects.del("s").expect("secrets can be deleted");
        assert!(objects.credentials.secret("s").is_err());
    });
}

#[test]
fn rules_follow_their_file() {
    with_objects(async |objects| {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let path = directory.path().join("rules.json");
        let write = |text: &str| std::fs::write(&path, text).expect("room for a line");
        write(r#"{"policy": "deny"}"#);
        let option = format!("authz-list-file,id=f,filename={}", path.display());
        must_add(objects, &option).await;
        let rule = objects
            .credentials
            .authorization("f")
            .expect("it is a rule");
        assert!(!rule.is_allowed("fred"));

        write(r#"{"policy": "allow"}"#);
        while !rule.is_allowed("fred") {
            tokio::task::yield_now().await;
        }
        // As editors do it.
        let other = directory.path().join("other");
        std::fs::write(&other, "{}").expect("room for a line");
        std::fs::rename(&other, &path).expect("a directory of ours");
        while rule.is_allowed("fred") {
            tokio::task::yield_now().await;
        }
        assert_eq!(set(objects, "/objects/f", "refresh", json!(false)), Ok(()));
        assert_eq!(get(objects, "/objects/f", "refresh"), Ok(json!(false)));
    });
}

#[test]
fn tls_credentials_tell_what_they_were_given_and_take_changes() {
    with_objects(async |objects| {
        must_add(objects, "tls-creds-anon,id=tls,endpoint=server").await;
        let credentials = objects.credentials();
        let is_for = |endpoint| credentials.tls("tls", endpoint).is_ok();
        assert!(is_for(QCryptoTLSCredsEndpoint::Server));
        for (property, before, after) in [
            ("endpoint", json!("server"), json!("client")),
            ("dir", json!(""), json!("/no/such")),
            ("verify-peer", json!(true), json!(false)),
            ("priority", json!(""), json!("NORMAL:-VERS-TLS1.3")),
        ] {
            let path = "/objects/tls";
            assert_eq!(get(objects, path, property), Ok(before));
            assert_eq!(set(objects, path, property, after.clone()), Ok(()));
            assert_eq!(get(objects, path, property), Ok(after));
        }
        assert!(is_for(QCryptoTLSCredsEndpoint::Client));
        let refused = set(objects, "tls", "priority", json!("X"));
        assert!(refused.is_err_and(|message| message.contains("'X' is unknown")));
        let refused = set(objects, "tls", "username", json!("fred"));
        assert_eq!(
            refused,
            Err("Property 'tls-creds-anon.username' not found".to_owned())
        );
        objects.del("tls").expect("it is there");
        assert!(!is_for(QCryptoTLSCredsEndpoint::Client));
        let missing = add(objects, "tls-creds-x509,id=tls").await;
        assert_eq!(missing, Err("Missing 'dir' property value".to_owned()));
    });
}
