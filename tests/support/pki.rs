//! Certificates as QEMU's documentation has them made, by GnuTLS's `certtool`.

use std::fs;
use std::path::PathBuf;

use super::run::run_in;
use super::{Scratch, run_ok};

/// What the documentation's templates say of servers and clients alike.
const ENDPOINT: &str = "country = GB\nstate = London\norganization = Example\n\
    cn = localhost\ndns_name = localhost\nip_address = 127.0.0.1\nsigning_key\nencryption_key\n";

/// The name of every endpoint, as GnuTLS writes it.
pub const NAME: &str = "C=GB,ST=London,O=Example,CN=localhost";

/// An authority, and directories of credentials that it stands for.
pub struct Pki<'s> {
    scratch: &'s Scratch,
}

impl<'s> Pki<'s> {
    /// A new authority, with one key for everything because making keys takes long.
    pub fn new(scratch: &'s Scratch) -> Pki<'s> {
        let key = scratch.path("key.pem");
        let key = key.to_str().unwrap();
        run_ok(
            "certtool",
            &[
                "--generate-privkey",
                "--key-type=rsa",
                "--bits=2048",
                "--outfile",
                key,
            ],
        );
        let pki = Pki { scratch };
        pki.authority("ca");
        pki
    }

    /// One more authority.
    pub fn authority(&self, name: &str) {
        let template = format!("cn = {name}\nca\ncert_signing_key\nexpiration_days = 2\n");
        self.certtool(
            &template,
            &[
                "--generate-self-signed",
                "--load-privkey=key.pem",
                &format!("--outfile={name}.pem"),
            ],
        );
    }

    /// A directory with certificates of that authority for `server` and `client`. `validity` is what the template says of it.
    pub fn directory(&self, name: &str, authority: &str, validity: &str) -> PathBuf {
        let dir = self.scratch.path(name);
        fs::create_dir(&dir).unwrap();
        fs::copy(
            self.scratch.path(&format!("{authority}.pem")),
            dir.join("ca-cert.pem"),
        )
        .unwrap();
        for (role, purpose) in [("server", "tls_www_server"), ("client", "tls_www_client")] {
            let template = format!("{ENDPOINT}{purpose}\n{validity}\n");
            self.certtool(
                &template,
                &[
                    "--generate-certificate",
                    &format!("--load-ca-certificate={authority}.pem"),
                    "--load-ca-privkey=key.pem",
                    "--load-privkey=key.pem",
                    &format!("--outfile={name}/{role}-cert.pem"),
                ],
            );
            fs::copy(
                self.scratch.path("key.pem"),
                dir.join(format!("{role}-key.pem")),
            )
            .unwrap();
        }
        dir
    }

    fn certtool(&self, template: &str, args: &[&str]) {
        fs::write(self.scratch.path("template"), template).unwrap();
        let mut all = vec!["--template=template"];
        all.extend(args);
        let ended = run_in(self.scratch.dir(), "certtool", &all);
        assert!(ended.success(), "{ended:?}");
    }
}
