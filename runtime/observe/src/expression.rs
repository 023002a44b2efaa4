//! CEL expressions of filters and tags: parsed once, when they are configured, with every attribute found then, and
//! evaluated over a finished exchange. An attribute's value is made only when the evaluation comes to it.

use crate::attribute::{Attribute, ROOTS};
use crate::clock::duration_text;
use crate::facts::Facts;
use cairn_telemetry::Wants;
use cel::common::ast::{
    CallExpr, ComprehensionExpr, EntryExpr, Expr, IdedEntryExpr, IdedExpr, LiteralValue, SelectExpr,
    operators,
};
use cel::common::value::CowVal;
use cel::context::VariableResolver;
use cel::{Context, Env, Program, Value};
use chrono::{DateTime, FixedOffset};
use regex::{Regex, RegexBuilder};
use std::borrow::Cow;
use std::sync::{Arc, LazyLock};

/// The longest expression.
const BYTES_MAX: usize = 4096;
/// The most operators, values and names of an expression, macros expanded.
const NODES_MAX: usize = 512;
/// How deep it may be nested.
const DEPTH_MAX: usize = 64;
/// The most bytes that a pattern, compiled, may take.
const PATTERN_BYTES_MAX: usize = 1 << 20;
/// The most patterns of an expression.
const PATTERNS_MAX: usize = 32;
/// How deep macros that go over lists may be nested: each multiplies what an evaluation costs.
const LOOPS_MAX: usize = 1;

/// Why an expression cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ExpressionError {
    /// It is not CEL.
    #[error("is not a CEL expression: {0}")]
    Syntax(String),
    /// It speaks of something that there is not.
    #[error("there is no attribute `{0}`")]
    UnknownAttribute(String),
    /// A pattern that it matches with is none.
    #[error("`{0}` is no pattern")]
    BadPattern(String),
    /// It is too long, too deep, or goes over lists within lists.
    #[error("costs too much: {0}")]
    TooCostly(&'static str),
}

/// An expression that is ready to be evaluated.
#[derive(Clone, Debug)]
pub struct Expression {
    expr: IdedExpr,
    attributes: Vec<Found>,
    /// The patterns that it matches with, where they do not change.
    patterns: Arc<[Regex]>,
    /// Its value, when it is a text that never changes.
    constant: Option<Arc<str>>,
}

/// An attribute that the expression asks for, or asks for the presence of.
#[derive(Clone, Debug)]
struct Found {
    attribute: Attribute,
    presence: bool,
}

static STANDARD: LazyLock<Arc<Env>> = LazyLock::new(|| Arc::new(Env::stdlib()));

impl Expression {
    /// Parses an expression and finds its attributes.
    ///
    /// # Errors
    /// When it is not CEL, speaks of attributes that there are not, or would cost too much.
    pub fn parse(text: &str) -> Result<Self, ExpressionError> {
        if text.len() > BYTES_MAX {
            return Err(ExpressionError::TooCostly("it is too long"));
        }
        if nesting(text) > DEPTH_MAX {
            return Err(ExpressionError::TooCostly("it is nested too deep"));
        }
        let program = Program::compile(text).map_err(|errors| {
            let first = errors.errors.first().map_or(String::new(), |error| error.msg.clone());
            ExpressionError::Syntax(first.lines().next().unwrap_or_default().to_owned())
        })?;
        let mut binder = Binder::default();
        let expr = binder.bind(program.expression(), 0)?;
        let constant = match &expr.expr {
            Expr::Literal(LiteralValue::String(text)) => Some(text.inner().into()),
            _ => None,
        };
        Ok(Self { expr, attributes: binder.found, patterns: binder.patterns.into(), constant })
    }

    /// Asks for the headers it needs.
    pub(crate) fn want(&self, wants: &mut Wants) {
        self.attributes.iter().for_each(|found| found.attribute.want(wants));
    }

    /// Whether it is true. What cannot be evaluated is not.
    pub(crate) fn is_true(&self, facts: &Facts<'_>) -> bool {
        matches!(self.value(facts), Some(Value::Bool(true)))
    }

    /// Its value as text; `None` when it cannot be evaluated, or is not a text, number or truth.
    pub(crate) fn text(&self, facts: &Facts<'_>) -> Option<Arc<str>> {
        if let Some(constant) = &self.constant {
            return Some(Arc::clone(constant));
        }
        Some(match self.value(facts)? {
            Value::String(text) => text.as_str().into(),
            Value::Int(number) => number.to_string().into(),
            Value::UInt(number) => number.to_string().into(),
            Value::Float(number) => number.to_string().into(),
            Value::Bool(flag) => flag.to_string().into(),
            Value::Duration(duration) => duration_text(duration.to_std().ok()?).into(),
            Value::Timestamp(at) => timestamp_text(&at).into(),
            _ => return None,
        })
    }

    /// Its value as it is written to a log: a header's bytes as they came, else as [`Expression::text`] has it.
    pub(crate) fn bytes<'a>(&self, facts: &Facts<'a>) -> Option<Cow<'a, [u8]>> {
        // An expression that is an attribute and nothing else.
        if let (Expr::Ident(_), [Found { attribute, presence: false }]) = (&self.expr.expr, &*self.attributes)
            && let Some(bytes) = attribute.bytes(facts)
        {
            return Some(bytes);
        }
        self.text(facts).map(|text| text.as_bytes().to_vec().into())
    }

    fn value(&self, facts: &Facts<'_>) -> Option<Value> {
        let resolver = Resolver { found: &self.attributes, facts: *facts };
        let mut context = Context::with_env(Arc::clone(&STANDARD));
        context.set_variable_resolver(&resolver);
        if !self.patterns.is_empty() {
            let patterns = Arc::clone(&self.patterns);
            let matches = move |text: Arc<String>, at: i64| {
                let pattern = usize::try_from(at).ok().and_then(|at| patterns.get(at));
                pattern.is_some_and(|pattern| pattern.is_match(&text))
            };
            context.add_function(MATCHES, matches).ok()?;
        }
        Value::resolve(&self.expr, &context).ok()
    }
}

/// A time as Envoy writes it: microseconds, without zeros at their end.
fn timestamp_text(at: &DateTime<FixedOffset>) -> String {
    let (seconds, micros) = (at.format("%Y-%m-%dT%H:%M:%S"), at.format("%6f").to_string());
    let micros = micros.trim_end_matches('0');
    let point = if micros.is_empty() { "" } else { "." };
    format!("{seconds}{point}{micros}{}", at.format("%:z"))
}

/// How deep brackets are nested, before anything recurses into them.
fn nesting(text: &str) -> usize {
    let (mut depth, mut deepest) = (0_usize, 0);
    for byte in text.bytes() {
        match byte {
            b'(' | b'[' | b'{' | b'?' => {
                depth += 1;
                deepest = deepest.max(depth);
            }
            b')' | b']' | b'}' => depth = depth.saturating_sub(1),
            _ => {}
        }
    }
    deepest
}

/// Gives values to the names that [`Binder`] put in place of attributes.
struct Resolver<'a> {
    found: &'a [Found],
    facts: Facts<'a>,
}

impl VariableResolver for Resolver<'_> {
    fn resolve<'b>(&'b self, name: &str) -> Option<CowVal<'b, 'b>> {
        let found = self.found.get(name.strip_prefix(MARK)?.parse::<usize>().ok()?)?;
        let value = found.attribute.value(&self.facts);
        if found.presence {
            return Some(CowVal::owned(cel::common::types::CelBool::from(value.is_some())));
        }
        value
    }
}

/// No name of CEL begins with it.
const MARK: char = '@';

/// The function in place of `matches` where the pattern does not change: it has the pattern's number.
const MATCHES: &str = "@matches";

/// Puts a name that the resolver knows in place of each attribute.
#[derive(Default)]
struct Binder {
    found: Vec<Found>,
    patterns: Vec<Regex>,
    nodes: usize,
    loops: usize,
    /// Variables of the macros around.
    own: Vec<String>,
}

impl Binder {
    fn bind(&mut self, expr: &IdedExpr, depth: usize) -> Result<IdedExpr, ExpressionError> {
        self.nodes += 1;
        if self.nodes > NODES_MAX {
            return Err(ExpressionError::TooCostly("it is too long"));
        }
        // Chains such as `a + b + …` nest without brackets.
        if depth > NODES_MAX / 2 {
            return Err(ExpressionError::TooCostly("it is nested too deep"));
        }
        if let Some(bound) = self.attribute(expr)? {
            return Ok(bound);
        }
        let depth = depth + 1;
        let bound = match &expr.expr {
            Expr::Ident(name) => {
                if !self.own.contains(name) && !name.starts_with(MARK) {
                    return Err(ExpressionError::UnknownAttribute(name.clone()));
                }
                Expr::Ident(name.clone())
            }
            Expr::Select(select) => Expr::Select(SelectExpr {
                operand: Box::new(self.bind(&select.operand, depth)?),
                ..select.clone()
            }),
            Expr::Call(call) if call.func_name == "matches" => self.bind_matches(call, depth)?,
            Expr::Call(call) => Expr::Call(CallExpr {
                func_name: call.func_name.clone(),
                target: match &call.target {
                    Some(target) => Some(Box::new(self.bind(target, depth)?)),
                    None => None,
                },
                args: call.args.iter().map(|one| self.bind(one, depth)).collect::<Result<_, _>>()?,
            }),
            Expr::List(list) => {
                let mut list = list.clone();
                for element in &mut list.elements {
                    *element = self.bind(element, depth)?;
                }
                Expr::List(list)
            }
            Expr::Map(map) => {
                let mut map = map.clone();
                for entry in &mut map.entries {
                    self.bind_entry(entry, depth)?;
                }
                Expr::Map(map)
            }
            Expr::Comprehension(inner) => Expr::Comprehension(Box::new(self.bind_loop(inner, depth)?)),
            Expr::Struct(_) => return Err(ExpressionError::Syntax("messages cannot be made".to_owned())),
            Expr::Literal(_) | Expr::Unspecified => expr.expr.clone(),
        };
        Ok(IdedExpr { id: expr.id, expr: bound })
    }

    /// `text.matches(pattern)` or `matches(text, pattern)`: a pattern that does not change is compiled now.
    fn bind_matches(&mut self, call: &CallExpr, depth: usize) -> Result<Expr, ExpressionError> {
        let mut args: Vec<&IdedExpr> = call.target.iter().map(|target| &**target).collect();
        args.extend(&call.args);
        let mut bound = args.iter().map(|one| self.bind(one, depth)).collect::<Result<Vec<_>, _>>()?;
        let mut func_name = call.func_name.clone();
        if let [_, IdedExpr { expr: pattern, .. }] = bound.as_mut_slice()
            && let Expr::Literal(LiteralValue::String(text)) = pattern
        {
            if self.patterns.len() == PATTERNS_MAX {
                return Err(ExpressionError::TooCostly("it has too many patterns"));
            }
            let compiled = RegexBuilder::new(text.inner()).size_limit(PATTERN_BYTES_MAX).build();
            self.patterns.push(compiled.map_err(|_| ExpressionError::BadPattern(text.inner().to_owned()))?);
            let at = i64::try_from(self.patterns.len() - 1).unwrap_or_default();
            *pattern = Expr::Literal(LiteralValue::Int(at.into()));
            func_name = MATCHES.to_owned();
        }
        Ok(Expr::Call(CallExpr { func_name, target: None, args: bound }))
    }

    fn bind_entry(&mut self, entry: &mut IdedEntryExpr, depth: usize) -> Result<(), ExpressionError> {
        match &mut entry.expr {
            EntryExpr::MapEntry(entry) => {
                entry.key = self.bind(&entry.key, depth)?;
                entry.value = self.bind(&entry.value, depth)?;
            }
            EntryExpr::StructField(field) => field.value = self.bind(&field.value, depth)?,
        }
        Ok(())
    }

    fn bind_loop(
        &mut self,
        inner: &ComprehensionExpr,
        depth: usize,
    ) -> Result<ComprehensionExpr, ExpressionError> {
        let mut bound = inner.clone();
        bound.iter_range = self.bind(&inner.iter_range, depth)?;
        bound.accu_init = self.bind(&inner.accu_init, depth)?;
        self.loops += 1;
        if self.loops > LOOPS_MAX {
            return Err(ExpressionError::TooCostly("it goes over lists within lists"));
        }
        let before = self.own.len();
        self.own.push(inner.iter_var.clone());
        self.own.extend(inner.iter_var2.clone());
        self.own.push(inner.accu_var.clone());
        bound.loop_cond = self.bind(&inner.loop_cond, depth)?;
        bound.loop_step = self.bind(&inner.loop_step, depth)?;
        bound.result = self.bind(&inner.result, depth)?;
        self.own.truncate(before);
        self.loops -= 1;
        Ok(bound)
    }

    /// The name in place of the attribute that `expr` is, or tests for; `None` if it is none.
    fn attribute(&mut self, expr: &IdedExpr) -> Result<Option<IdedExpr>, ExpressionError> {
        let Some(path) = path(expr) else { return Ok(None) };
        let root = path.first().map_or("", |root| root);
        if !ROOTS.contains(&root) || self.own.iter().any(|own| *own == root) {
            return Ok(None);
        }
        let names: Vec<&str> = path.iter().map(|name| &**name).collect();
        let attribute =
            Attribute::find(&names).ok_or_else(|| ExpressionError::UnknownAttribute(names.join(".")))?;
        let presence = matches!(&expr.expr, Expr::Select(select) if select.test);
        self.found.push(Found { attribute, presence });
        let name = format!("{MARK}{}", self.found.len() - 1);
        Ok(Some(IdedExpr { id: expr.id, expr: Expr::Ident(name) }))
    }
}

/// The names of `a.b["c"].d`, and of `has(a.b)`.
fn path(expr: &IdedExpr) -> Option<Vec<Cow<'_, str>>> {
    match &expr.expr {
        Expr::Ident(name) => Some(vec![Cow::Borrowed(name)]),
        Expr::Select(select) => {
            let mut names = path(&select.operand)?;
            names.push(Cow::Borrowed(&select.field));
            Some(names)
        }
        Expr::Call(call) if call.func_name == operators::INDEX => match call.args.as_slice() {
            [operand, IdedExpr { expr: Expr::Literal(LiteralValue::String(key)), .. }] => {
                let mut names = path(operand)?;
                names.push(Cow::Borrowed(key.inner()));
                Some(names)
            }
            _ => None,
        },
        _ => None,
    }
}

#[cfg(test)]
#[path = "expression/tests.rs"]
mod tests;
