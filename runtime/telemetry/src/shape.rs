//! How the metrics of one destination differ from the standard ones: which are counted, and under which labels.

use cairn_mesh::Metric;
use smallvec::SmallVec;
use std::sync::Arc;

/// Which metrics are counted, and how their labels differ from the standard ones.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct MetricShape {
    forms: [MetricForm; Metric::ALL.len()],
    /// How many values of its own a label set has.
    values: usize,
}

/// How one metric differs.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct MetricForm {
    /// It is not counted.
    pub disabled: bool,
    /// Labels that are left out.
    pub removed: Vec<Arc<str>>,
    /// Labels that have another value, or are new: the name, and which of the label set's own values.
    pub set: Vec<(Arc<str>, usize)>,
}

impl MetricShape {
    /// A shape in which `form` says how each metric differs, and label sets have `values` values of their own.
    pub fn new(values: usize, mut form: impl FnMut(Metric) -> MetricForm) -> Self {
        let mut shape = Self { values, ..Self::default() };
        for (place, (_, metric)) in shape.forms.iter_mut().zip(Metric::ALL) {
            *place = form(metric);
        }
        shape
    }

    /// How many values of its own a label set has.
    pub fn values(&self) -> usize {
        self.values
    }

    /// How a metric differs.
    pub fn form(&self, metric: Metric) -> &MetricForm {
        // The order of the variants is that of `Metric::ALL`.
        &self.forms[metric as usize % Metric::ALL.len()]
    }

    /// Whether nothing differs.
    pub(crate) fn is_standard(&self) -> bool {
        self.values == 0 && self.forms.iter().all(|form| *form == MetricForm::default())
    }

    /// Whether no metric that is counted has this label.
    pub(crate) fn drops(&self, label: &str) -> bool {
        self.forms.iter().all(|form| form.disabled || form.removed.iter().any(|name| &**name == label))
    }
}

/// A label set's own values, and what they are the values of.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Custom {
    pub(crate) shape: Arc<MetricShape>,
    pub(crate) values: SmallVec<[Arc<str>; 2]>,
}

impl Custom {
    /// The same with values that say nothing.
    pub(crate) fn overflow(&self) -> Self {
        let unknown: Arc<str> = crate::labels::UNKNOWN.into();
        let values = self.values.iter().map(|_| Arc::clone(&unknown)).collect();
        Self { shape: Arc::clone(&self.shape), values }
    }
}

/// Writes the labels of one metric: `standard` hands over the standard ones in order.
pub(crate) fn render(
    custom: Option<&Custom>,
    metric: Option<Metric>,
    out: &mut String,
    standard: impl FnOnce(&mut dyn FnMut(&str, &str)),
) {
    let form = custom.zip(metric).map(|(custom, metric)| (custom, custom.shape.form(metric)));
    let own = |name: &str| {
        let (custom, form) = form?;
        let (_, index) = form.set.iter().find(|(set, _)| &**set == name)?;
        custom.values.get(*index).map(|value| &**value)
    };
    let mut met: SmallVec<[&str; 4]> = SmallVec::new();
    let mut known: SmallVec<[String; 4]> = SmallVec::new();
    standard(&mut |name, value| {
        if let Some((_, form)) = form {
            if form.removed.iter().any(|removed| &**removed == name) {
                return;
            }
            if let Some(value) = own(name) {
                known.push(name.to_owned());
                return put(out, name, value);
            }
        }
        put(out, name, value);
    });
    if let Some((custom, form)) = form {
        for (name, index) in &form.set {
            if known.iter().any(|known| **known == **name) || met.contains(&&**name) {
                continue;
            }
            met.push(name);
            put(out, name, custom.values.get(*index).map_or("", |value| &**value));
        }
    }
}

/// Appends `name="value"`, with a comma if it is not the first.
pub(crate) fn put(out: &mut String, name: &str, value: &str) {
    if !out.is_empty() {
        out.push(',');
    }
    out.push_str(name);
    out.push_str("=\"");
    if value.contains(['\\', '"', '\n']) {
        for letter in value.chars() {
            match letter {
                '\\' => out.push_str("\\\\"),
                '"' => out.push_str("\\\""),
                '\n' => out.push_str("\\n"),
                letter => out.push(letter),
            }
        }
    } else {
        out.push_str(value);
    }
    out.push('"');
}
