//! SIGTERM and SIGINT with `--json`: all sessions write their objects before the signal ends s5.

use std::cell::Cell;
use std::future::pending;

use async_signal::{Signal, Signals};
use futures_lite::StreamExt as _;
use smol::channel::{self, Receiver, Sender};

/// The signal that ends s5, once it has arrived.
pub(super) struct SignalWatch {
    received: Cell<Option<Signal>>,
    /// Closed by the signal.
    waiting: (Sender<()>, Receiver<()>),
}

impl SignalWatch {
    pub(super) fn new() -> Self {
        Self { received: Cell::default(), waiting: channel::bounded(1) }
    }

    /// Waits for a signal, and wakes all sessions.
    pub(super) async fn watch<T>(&self) -> T {
        if let Ok(mut signals) = Signals::new([Signal::Term, Signal::Int])
            && let Some(Ok(signal)) = signals.next().await
        {
            self.received.set(Some(signal));
            self.waiting.0.close();
        }
        pending().await
    }

    /// Waits until a session must end.
    pub(super) async fn wait(&self) -> Signal {
        let _ = self.waiting.1.recv().await;
        self.received.get().unwrap_or(Signal::Term)
    }

    /// Ends the process if a signal has arrived, as that signal does without a handler.
    pub(super) fn raise(&self) {
        if let Some(signal) = self.received.get() {
            let _ = signal_hook::low_level::emulate_default_handler(signal as i32);
        }
    }
}
