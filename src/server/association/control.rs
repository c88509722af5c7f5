//! The control connection of an association, which carries no more data.

use futures_lite::AsyncReadExt as _;

use crate::conn::Conn;

/// Bytes on the control connection that are read and ignored. More end the association.
const MAX_CONTROL_BYTES: usize = 64 * 1024;

/// Waits until the client closes the control connection, or returns an error if it sends too much data on it.
pub(super) async fn wait_for_end(control: &mut Conn) -> Option<String> {
    let mut ignored = [0; 256];
    let mut total = 0;
    while let Ok(n @ 1..) = control.read(&mut ignored).await {
        total += n;
        if total > MAX_CONTROL_BYTES {
            return Some("too much data on the control connection".into());
        }
    }
    None
}
