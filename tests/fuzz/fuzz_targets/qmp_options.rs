//! Options of the command line, as keyval, as options of the older kind, and as JSON: what is accepted survives being encoded and
//! decoded again.
#![no_main]

use libfuzzer_sys::fuzz_target;
use stord_qmp::schema::block::BlockdevOptions;
use stord_qmp::schema::create::BlockdevCreate;
use stord_qmp::schema::export::BlockExportOptions;
use stord_qmp::schema::monitor::MonitorOptions;
use stord_qmp::schema::object::ObjectOptions;
use stord_qmp::{Qapi, chardev_opts, from_json, from_keyval, keyval, opts, to_json};

fn decode<T: Qapi>(text: &str, implied_key: Option<&str>) {
    let Ok(decoded) = from_keyval::<T>(text, implied_key) else {
        return;
    };
    let encoded = to_json(&decoded);
    let again: T = from_json(encoded.clone()).expect("its own output");
    assert_eq!(to_json(&again), encoded);
}

fuzz_target!(|data: &[u8]| {
    let Ok(text) = std::str::from_utf8(data) else {
        return;
    };
    decode::<BlockdevOptions>(text, Some("driver"));
    decode::<BlockExportOptions>(text, Some("type"));
    decode::<ObjectOptions>(text, Some("qom-type"));
    decode::<MonitorOptions>(text, Some("chardev"));
    decode::<BlockdevCreate>(text, None);
    let _ = keyval::parse(text, None);
    if let Ok(opts) = opts::Opts::parse(text, "backend") {
        let _ = chardev_opts::translate(opts);
    }
});
