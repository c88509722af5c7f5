//! Connections of load balancers: reads the header of the PROXY protocol before the login. Until the client is known, the
//! connection counts against nobody.

use std::net::SocketAddr;
use std::time::Instant;

use super::handshakes::HandshakeGuard;
use super::log_shares::set_current_client;
use super::reply::{SessionError, SessionResult};
use super::state::{Session, SessionPermit};
use crate::conn::{Conn, ReadError};
use crate::net::timeout_at;
use crate::proto::ProxyHeader;

impl Session {
    /// Reads the header, and does what is done at accept for other clients.
    pub(super) async fn identify_client(
        &mut self,
        conn: &mut Conn,
        handshake: &HandshakeGuard,
        deadline: Instant,
    ) -> SessionResult<()> {
        if let Some(client) = self.read_proxy_header(conn, deadline).await? {
            self.log.set_forwarded_client(client);
        }
        let key = self.log.client_key();
        set_current_client(key);
        handshake.assign(key);
        let SessionPermit { server, share, .. } = &mut self.permit;
        if !server.limiter.admit_client(share, self.log.client()) {
            return Err(SessionError::silent("limit of connections of this client reached").quiet());
        }
        self.check_client()
    }

    /// Returns the client in the header. `None`: the balancer itself.
    async fn read_proxy_header(&self, conn: &mut Conn, deadline: Instant) -> SessionResult<Option<SocketAddr>> {
        let too_slow = || format!("no complete PROXY header within {:?}", self.server().options.handshake_timeout);
        let header = timeout_at(deadline, conn.read_message()).await.ok_or_else(|| SessionError::silent(too_slow()))?;
        let ProxyHeader { client } = header.map_err(|error| match &error {
            // A health check that only connects.
            ReadError::Closed(begun, _) if begun.is_empty() => SessionError::silent(error).quiet(),
            ReadError::Protocol(_, bytes) if !ProxyHeader::is_start(bytes) => SessionError::silent(format!(
                "{error} (let the load balancer send it, or remove the address from --proxy-protocol-from)"
            )),
            _ => SessionError::silent(format!("PROXY header: {error}")),
        })?;
        // A loopback address of another host gives no access to that of this one.
        let is_local = self.log.client().is_none_or(|balancer| balancer.ip().is_loopback());
        Ok(client.filter(|client| is_local || !client.ip().is_loopback()))
    }
}
