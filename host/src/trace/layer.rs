//! What hears `tracing`'s spans: each is recorded when it is closed.
//!
//! Invariant: only spans of the target `peerlane` are looked at, whatever else the subscriber has.

use super::TARGET;
use super::line::{Span, Value, now};
use super::recorder::{is_recording, own_lane, record};
use std::borrow::Cow;
use std::fmt::Debug;
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Metadata, Subscriber};
use tracing_subscriber::layer::Context;
use tracing_subscriber::registry::LookupSpan;

/// Records Peerlane's spans; [`start_beside`](super::start_beside) makes one.
#[derive(Debug)]
pub struct Layer {
    _made_by_start: (),
}

impl Layer {
    pub(super) const fn new() -> Layer {
        Layer { _made_by_start: () }
    }
}

impl<S: Subscriber + for<'a> LookupSpan<'a>> tracing_subscriber::Layer<S> for Layer {
    fn on_new_span(&self, attributes: &Attributes<'_>, id: &Id, context: Context<'_, S>) {
        let Some(span) = context.span(id).filter(|span| is_ours(span.metadata())) else { return };
        let name = Cow::Borrowed(span.metadata().name());
        let mut begun =
            Span { name, lane: own_lane(), begin: now(), end: 0, args: Default::default() };
        attributes.record(&mut Fields(&mut begun));
        span.extensions_mut().insert(begun);
    }

    fn on_record(&self, id: &Id, values: &Record<'_>, context: Context<'_, S>) {
        let Some(span) = context.span(id).filter(|span| is_ours(span.metadata())) else { return };
        if let Some(begun) = span.extensions_mut().get_mut::<Span>() {
            values.record(&mut Fields(begun));
        }
    }

    fn on_close(&self, id: Id, context: Context<'_, S>) {
        let Some(span) = context.span(&id).filter(|span| is_ours(span.metadata())) else { return };
        let begun = span.extensions_mut().remove::<Span>();
        if let Some(begun) = begun {
            record(Span { end: now(), ..begun });
        }
    }
}

fn is_ours(metadata: &Metadata<'_>) -> bool {
    metadata.target() == TARGET && is_recording()
}

/// A span's arguments, out of its fields.
struct Fields<'a>(&'a mut Span);

impl Fields<'_> {
    fn put(&mut self, field: &Field, value: Value) {
        self.0.args.insert(Cow::Borrowed(field.name()), value);
    }
}

impl Visit for Fields<'_> {
    fn record_u64(&mut self, field: &Field, value: u64) {
        self.put(field, Value::Number(value));
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.put(field, Value::Number(value.into()));
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.put(field, value.to_owned().into());
    }

    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        self.put(field, format!("{value:?}").into());
    }
}
