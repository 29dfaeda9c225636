//! TLS credentials: who stord is to its TLS peers, and whom it takes them for. They are loaded and
//! looked over when their object is made; sessions made of them do no I/O of their own.
//!
//! - [`TlsSession`] is a connection without its transport.
//! - A client of [`Kind::X509`] without `verify-peer` accepts everybody, and a server then asks for no
//!   certificate. Clients with pre-shared keys accept nobody who does not know the key.
//! - There are no tickets and no renegotiation: every connection proves anew who it is.

mod certificate;
mod der;
mod dh;
mod name;
mod priority;
mod psk;
mod session;
mod suites;
#[cfg(test)]
mod tests;
mod x509;

use std::fs;
use std::io;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use openssl::dh::Dh;
use openssl::error::ErrorStack;
use openssl::pkey::Params;
use openssl::ssl::{
    Ssl, SslContext, SslContextBuilder, SslMethod, SslOptions, SslSessionCacheMode, SslVerifyMode,
};
use stord_qmp::Error;
use stord_qmp::schema::object::QCryptoTLSCredsEndpoint as Endpoint;
use stord_qmp::schema::object::{
    TlsCredsAnonProperties, TlsCredsProperties, TlsCredsPskProperties, TlsCredsX509Properties,
};

use crate::Credentials;
use priority::Priority;
use psk::Keys;
pub use session::{Handshake, Plaintext, Role, TlsSession};

/// Who stord is to its TLS peers, and whom it takes them for.
pub struct TlsCredentials {
    kind: Kind,
    settings: Mutex<Settings>,
}

/// What is loaded.
enum Kind {
    /// Nothing: what is said is kept from those who only listen, no more.
    Anonymous,
    /// Keys that both sides have.
    Psk(Arc<Keys>),
    /// Certificates.
    X509(x509::Material),
}

/// What may change later.
struct Settings {
    endpoint: Endpoint,
    verify_peer: bool,
    priority: Priority,
    group: Option<Dh<Params>>,
    /// Made when first needed.
    context: Option<SslContext>,
}

impl TlsCredentials {
    /// Credentials without any proof of who somebody is. Blocks while files are read.
    ///
    /// # Errors
    /// A file is no good, or the priority string.
    pub fn anonymous(properties: &TlsCredsAnonProperties) -> Result<Self, Error> {
        Self::load(&properties.common, || Ok(Kind::Anonymous))
    }

    /// Credentials of pre-shared keys. Blocks while files are read.
    ///
    /// # Errors
    /// A file is missing or no good, or the priority string.
    pub fn psk(properties: &TlsCredsPskProperties) -> Result<Self, Error> {
        Self::load(&properties.common, || {
            Ok(Kind::Psk(Arc::new(Keys::load(properties)?)))
        })
    }

    /// Credentials of certificates. Blocks while files are read.
    ///
    /// # Errors
    /// A file is missing or no good, the password of the key, or the priority string.
    pub fn x509(
        properties: &TlsCredsX509Properties,
        credentials: &Credentials,
    ) -> Result<Self, Error> {
        Self::load(&properties.common, || {
            x509::Material::load(properties, credentials).map(Kind::X509)
        })
    }

    fn load(
        common: &TlsCredsProperties,
        kind: impl FnOnce() -> Result<Kind, Error>,
    ) -> Result<Self, Error> {
        let priority = Priority::parse(common.priority.as_deref().unwrap_or_default())?;
        let endpoint = common.endpoint.unwrap_or(Endpoint::Client);
        let kind = kind()?;
        let group = match endpoint {
            Endpoint::Server => load_group(common)?,
            Endpoint::Client => None,
        };
        Ok(Self {
            kind,
            settings: Mutex::new(Settings {
                endpoint,
                verify_peer: common.verify_peer.unwrap_or(true),
                priority,
                group,
                context: None,
            }),
        })
    }

    fn settings(&self) -> MutexGuard<'_, Settings> {
        self.settings.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The side of connections that they are for.
    pub fn endpoint(&self) -> Endpoint {
        self.settings().endpoint
    }

    /// Says which side of later connections they are for.
    pub fn set_endpoint(&self, endpoint: Endpoint) {
        self.settings().endpoint = endpoint;
    }

    /// Says whether the peers of later connections must prove who they are.
    pub fn set_verify_peer(&self, verify_peer: bool) {
        let mut settings = self.settings();
        settings.verify_peer = verify_peer;
        settings.context = None;
    }

    /// Says what of TLS later connections may use.
    ///
    /// # Errors
    /// The string is not understood; nothing has changed then.
    pub fn set_priority(&self, text: &str) -> Result<(), Error> {
        let priority = Priority::parse(text)?;
        let mut settings = self.settings();
        settings.priority = priority;
        settings.context = None;
        Ok(())
    }

    /// Refuses credentials that are for the other side of connections.
    ///
    /// # Errors
    /// They are.
    pub fn expect(&self, endpoint: Endpoint) -> Result<(), Error> {
        if self.endpoint() == endpoint {
            return Ok(());
        }
        let role = endpoint.name();
        Err(Error::generic(format!(
            "Expected TLS credentials for a {role} endpoint"
        )))
    }

    /// A session with a client that has connected.
    ///
    /// # Errors
    /// They are for clients, or OpenSSL can make nothing of them.
    pub fn server_session(&self) -> Result<TlsSession, Error> {
        self.expect(Endpoint::Server)?;
        let mut ssl = self.ssl()?;
        ssl.set_accept_state();
        let has_verified_peer = self.verifies_certificates();
        TlsSession::new(ssl, Role::Server, None, has_verified_peer)
    }

    /// A session with a server that was connected to, whose certificate must be for that host: a
    /// name or an address. Credentials that verify certificates need one.
    ///
    /// # Errors
    /// They are for servers, the host is missing, or OpenSSL can make nothing of them.
    pub fn client_session(&self, hostname: Option<&str>) -> Result<TlsSession, Error> {
        self.expect(Endpoint::Client)?;
        let mut ssl = self.ssl()?;
        ssl.set_connect_state();
        if matches!(self.kind, Kind::Psk(_)) {
            // A server that shows a certificate instead of knowing the key is no good.
            ssl.set_verify(SslVerifyMode::PEER);
        }
        let has_verified_peer = self.verifies_certificates();
        if has_verified_peer {
            let hostname =
                hostname.ok_or_else(|| Error::generic("No hostname for certificate validation"))?;
            let expected = match hostname.parse::<IpAddr>() {
                Ok(address) => ssl.param_mut().set_ip(address),
                Err(_) => ssl.param_mut().set_host(hostname),
            };
            expected.map_err(|error| failed(&error))?;
        }
        if let Some(name) = hostname.filter(|name| name.parse::<IpAddr>().is_err()) {
            ssl.set_hostname(name).map_err(|error| failed(&error))?;
        }
        TlsSession::new(
            ssl,
            Role::Client,
            hostname.map(str::to_owned),
            has_verified_peer,
        )
    }

    fn verifies_certificates(&self) -> bool {
        matches!(self.kind, Kind::X509(_)) && self.settings().verify_peer
    }

    fn ssl(&self) -> Result<Ssl, Error> {
        let mut settings = self.settings();
        let context = match settings.context.take() {
            Some(context) => context,
            None => self.context(&settings)?,
        };
        let ssl = Ssl::new(&context).map_err(|error| failed(&error));
        settings.context = Some(context);
        ssl
    }

    fn context(&self, settings: &Settings) -> Result<SslContext, Error> {
        let mut context = SslContext::builder(SslMethod::tls()).map_err(|error| failed(&error))?;
        context.set_options(SslOptions::NO_TICKET | SslOptions::NO_RENEGOTIATION);
        context.set_session_cache_mode(SslSessionCacheMode::OFF);
        // A record's header and body are had at once, and the records after it.
        context.set_read_ahead(true);
        let told = context.set_num_tickets(0);
        told.map_err(|error| failed(&error))?;
        let group = match &settings.group {
            Some(group) => context.set_tmp_dh(group),
            None => dh::well_known().and_then(|group| context.set_tmp_dh(&group)),
        };
        group.map_err(|error| failed(&error))?;
        let priority = settings.priority.clone();
        let priority = match &self.kind {
            Kind::Anonymous => {
                context.set_verify(SslVerifyMode::NONE);
                // No level of security but the lowest has anonymous suites.
                let anonymous = priority.with_exchanges(&["ANON-ECDH", "ANON-DH"]);
                anonymous.without_tls_1_3().with_level(0)
            }
            Kind::Psk(keys) => {
                set_keys(&mut context, keys);
                priority.with_exchanges(&["ECDHE-PSK", "DHE-PSK", "PSK"])
            }
            Kind::X509(material) => {
                material.apply(&mut context, settings.verify_peer)?;
                priority
            }
        };
        priority.apply(&mut context)?;
        Ok(context.build())
    }
}

fn set_keys(context: &mut SslContextBuilder, keys: &Arc<Keys>) {
    let known = Arc::clone(keys);
    context.set_psk_server_callback(move |_, user, key| {
        let user = user.and_then(|user| std::str::from_utf8(user).ok());
        let found = user.and_then(|user| known.key(user));
        Ok(found.map_or(0, |found| put(&found, key)))
    });
    let known = Arc::clone(keys);
    context.set_psk_client_callback(move |_, _, user, key| {
        let name = known.user();
        // The name must end with a zero inside its buffer.
        let has_room = name.len() < user.len();
        let found = known.key(name).filter(|_| has_room);
        put(name.as_bytes(), user);
        if let Some(end) = user.get_mut(name.len()) {
            *end = 0;
        }
        Ok(found.map_or(0, |found| put(&found, key)))
    });
}

/// Copies the bytes if there is room for all of them, and returns how many were copied.
fn put(bytes: &[u8], into: &mut [u8]) -> usize {
    match into.get_mut(..bytes.len()) {
        Some(into) => {
            into.copy_from_slice(bytes);
            bytes.len()
        }
        None => 0,
    }
}

/// The group in the directory, if there is one.
fn load_group(common: &TlsCredsProperties) -> Result<Option<Dh<Params>>, Error> {
    let Some(path) = Directory::of(common).optional("dh-params.pem")? else {
        return Ok(None);
    };
    let encoded = fs::read(&path).map_err(|error| {
        let reason = Error::reason(&error);
        Error::generic(format!(
            "Failed to open file \u{201c}{path}\u{201d}: {reason}"
        ))
        .with_source(error)
    })?;
    match Dh::params_from_pem(&encoded) {
        Ok(group) => Ok(Some(group)),
        Err(_) => Err(Error::generic(format!(
            "Unable to load DH parameters from {path}: Base64 unexpected header error."
        ))),
    }
}

fn failed(error: &ErrorStack) -> Error {
    let reason = openssl_reason(error);
    Error::generic(format!("Failed to create TLS session: {reason}"))
}

/// The first reason that OpenSSL gives.
fn openssl_reason(error: &ErrorStack) -> String {
    let mut errors = error.errors().iter();
    let reason = errors.find_map(openssl::error::Error::reason);
    reason.unwrap_or("unknown error").to_owned()
}

/// Where credentials are stored.
struct Directory<'a>(Option<&'a str>);

impl<'a> Directory<'a> {
    fn of(common: &'a TlsCredsProperties) -> Self {
        Self(common.dir.as_deref())
    }

    /// The path of a file that is there.
    fn required(&self, name: &str) -> Result<String, Error> {
        match self.0 {
            None => Err(Error::generic("Missing 'dir' property value")),
            Some(directory) => {
                let path = format!("{directory}/{name}");
                match fs::metadata(&path) {
                    Ok(_) => Ok(path),
                    Err(error) => Err(inaccessible(&path, error)),
                }
            }
        }
    }

    /// The path of a file if it is there.
    fn optional(&self, name: &str) -> Result<Option<String>, Error> {
        let Some(directory) = self.0 else {
            return Ok(None);
        };
        let path = format!("{directory}/{name}");
        match fs::metadata(&path) {
            Ok(_) => Ok(Some(path)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(inaccessible(&path, error)),
        }
    }
}

fn inaccessible(path: &str, error: io::Error) -> Error {
    let reason = Error::reason(&error);
    Error::generic(format!("Unable to access credentials {path}: {reason}")).with_source(error)
}
