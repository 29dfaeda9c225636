//! Images on NBD servers, as people name them: `nbd://HOST/EXPORT`, `nbd+unix:///EXPORT?socket=PATH`, and `nbds` in place of `nbd` for TLS
//! with the parameters that libnbd knows (`tls-certificates`, `tls-psk-file`, `tls-hostname`, `tls-verify-peer`).

use std::path::{Path, PathBuf};
use std::sync::Arc;

use stord_block::drivers::protocol::nbd::uri::{self, Security};
use stord_credentials::{Credential, Credentials, TlsCredentials};
use stord_qmp::Error;
use stord_qmp::schema::block::BlockdevDriver;
use stord_qmp::schema::object::{
    QCryptoTLSCredsEndpoint, TlsCredsProperties, TlsCredsPskProperties, TlsCredsX509Properties,
};

/// The id that the credentials of a URI get.
const CREDENTIALS: &str = "uri";
/// What a file of keys is called.
const KEYS: &str = "keys.psk";

/// Whether the name of an image leads to an NBD server.
pub fn is_remote(name: &Path) -> bool {
    name.to_str().is_some_and(uri::is_uri)
}

/// The driver that opens what the URI leads to; what it needs to speak TLS is put among the credentials. Blocks while files are read.
///
/// # Errors
/// It is malformed, or there are no credentials where it says.
pub fn driver(name: &Path, credentials: &Credentials) -> Result<BlockdevDriver, Error> {
    let text = name.to_str();
    let text =
        text.ok_or_else(|| Error::generic(format!("'{}' is not valid UTF-8", name.display())))?;
    let (mut options, security) = uri::parse_with_security(text)?;
    if let Some(security) = security {
        let tls = load(security, credentials)?;
        credentials.insert(CREDENTIALS, Credential::Tls(Arc::new(tls)));
        options.tls_creds = Some(CREDENTIALS.to_owned());
    }
    Ok(BlockdevDriver::Nbd(options))
}

fn load(security: Security, credentials: &Credentials) -> Result<TlsCredentials, Error> {
    let Security {
        user,
        certificates,
        psk_file,
        verify_peer,
    } = security;
    let common = |dir: &Path| TlsCredsProperties {
        verify_peer,
        dir: Some(dir.display().to_string()),
        endpoint: Some(QCryptoTLSCredsEndpoint::Client),
        priority: None,
    };
    if let Some(file) = psk_file {
        let file = Path::new(&file);
        if !file.ends_with(KEYS) {
            return Err(Error::generic(format!(
                "the file of pre-shared keys '{}' must be called {KEYS}",
                file.display()
            )));
        }
        return TlsCredentials::psk(&TlsCredsPskProperties {
            common: common(file.parent().unwrap_or(Path::new("."))),
            username: user,
        });
    }
    let dir = certificates
        .map(PathBuf::from)
        .or_else(default_certificates)
        .ok_or_else(|| {
            Error::generic("no certificates for TLS found in ~/.pki/libnbd, ~/.config/pki/libnbd or /etc/pki/libnbd")
                .with_hint("Say where they are: nbds://HOST/EXPORT?tls-certificates=DIRECTORY")
        })?;
    let properties = TlsCredsX509Properties {
        common: common(&dir),
        ..TlsCredsX509Properties::default()
    };
    TlsCredentials::x509(&properties, credentials)
}

/// Where libnbd looks.
fn default_certificates() -> Option<PathBuf> {
    let home = std::env::var_os("HOME").map(PathBuf::from);
    let own = home
        .iter()
        .flat_map(|home| [home.join(".pki/libnbd"), home.join(".config/pki/libnbd")]);
    own.chain([PathBuf::from("/etc/pki/libnbd")])
        .find(|dir| dir.join("ca-cert.pem").is_file())
}
