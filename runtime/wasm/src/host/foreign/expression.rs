//! Expressions in CEL over properties: `expr_create`, `expr_evaluate` and `expr_delete`.
//!
//! The names of properties in an expression are found when it is made; their values are looked up when the evaluation
//! comes to them.

use super::super::properties::{Value as Property, property};
use crate::abi::Status;
use crate::state::State;
use cel::common::ast::{
    CallExpr, ComprehensionExpr, EntryExpr, Expr, IdedEntryExpr, IdedExpr, LiteralValue, SelectExpr,
    operators,
};
use cel::common::types::{CelBool, CelInt, CelString};
use cel::common::value::CowVal;
use cel::context::VariableResolver;
use cel::{Context, Env, Program, Value};
use std::borrow::Cow;
use std::collections::HashMap;
use std::sync::{Arc, LazyLock};

/// The most expressions of one instance.
const EXPRESSIONS_MAX: usize = 256;
/// The longest expression, the most of its nodes, and how deep loops may be nested: an evaluation cannot be interrupted.
const BYTES_MAX: usize = 4096;
const NODES_MAX: usize = 512;
const DEPTH_MAX: usize = 64;
const LOOPS_MAX: usize = 1;

/// The first words of properties that expressions may speak of.
const ROOTS: [&str; 13] = [
    "request",
    "response",
    "connection",
    "source",
    "destination",
    "upstream",
    "node",
    "xds",
    "metadata",
    "filter_state",
    "plugin_name",
    "plugin_root_id",
    "plugin_vm_id",
];

/// The expressions of one instance.
#[derive(Clone, Default)]
pub(crate) struct Expressions {
    known: HashMap<u32, Arc<Expression>>,
    next: u32,
}

struct Expression {
    expr: IdedExpr,
    found: Vec<Found>,
}

/// A property that the expression asks for, or asks for the presence of; segments joined by NUL.
struct Found {
    path: Vec<u8>,
    presence: bool,
}

static STANDARD: LazyLock<Arc<Env>> = LazyLock::new(|| Arc::new(Env::stdlib()));

/// `expr_create`: the id of an expression.
pub(super) fn create(state: &mut State, text: &[u8]) -> Result<Vec<u8>, Status> {
    let text = std::str::from_utf8(text).map_err(|_| Status::BadArgument)?;
    let expression = Expression::parse(text).ok_or(Status::BadArgument)?;
    if state.expressions.known.len() >= EXPRESSIONS_MAX {
        state.in_vain(&format!("more than {EXPRESSIONS_MAX} expressions"));
        return Err(Status::InternalFailure);
    }
    let Expressions { known, next } = &mut state.expressions;
    while known.contains_key(next) {
        *next = next.wrapping_add(1);
    }
    let id = *next;
    known.insert(id, Arc::new(expression));
    *next = next.wrapping_add(1);
    Ok(id.to_le_bytes().to_vec())
}

/// `expr_evaluate`: the value, in the form of properties.
pub(super) fn evaluate(state: &State, id: &[u8]) -> Result<Vec<u8>, Status> {
    let expression = state.expressions.known.get(&number(id)?).ok_or(Status::NotFound)?;
    let value = expression.value(state).ok_or(Status::InternalFailure)?;
    let mut out = Vec::new();
    of_cel(&value).ok_or(Status::SerializationFailure)?.write(&mut out)?;
    Ok(out)
}

/// `expr_delete`.
pub(super) fn delete(state: &mut State, id: &[u8]) -> Result<Vec<u8>, Status> {
    state.expressions.known.remove(&number(id)?);
    Ok(Vec::new())
}

fn number(bytes: &[u8]) -> Result<u32, Status> {
    bytes.try_into().map(u32::from_le_bytes).map_err(|_| Status::BadArgument)
}

impl Expression {
    fn parse(text: &str) -> Option<Self> {
        if text.len() > BYTES_MAX || nesting(text) > DEPTH_MAX {
            return None;
        }
        let program = Program::compile(text).ok()?;
        let mut binder = Binder::default();
        let expr = binder.bind(program.expression(), 0)?;
        Some(Self { expr, found: binder.found })
    }

    fn value(&self, state: &State) -> Option<Value> {
        let resolver = Resolver { found: &self.found, state };
        let mut context = Context::with_env(Arc::clone(&STANDARD));
        context.set_variable_resolver(&resolver);
        Value::resolve(&self.expr, &context).ok()
    }
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

/// No name of CEL begins with it.
const MARK: char = '@';

/// Gives values to the names that [`Binder`] put in place of properties.
struct Resolver<'a> {
    found: &'a [Found],
    state: &'a State,
}

impl VariableResolver for Resolver<'_> {
    fn resolve<'b>(&'b self, name: &str) -> Option<CowVal<'b, 'b>> {
        let found = self.found.get(name.strip_prefix(MARK)?.parse::<usize>().ok()?)?;
        let value = property(self.state, &found.path);
        if found.presence {
            return Some(CowVal::owned(CelBool::from(value.is_some())));
        }
        cel_of(&value?)
    }
}

/// A property as CEL has it.
fn cel_of(property: &Property<'_>) -> Option<CowVal<'static, 'static>> {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    Some(match property {
        Property::Bytes(bytes) => CowVal::owned(CelString::from(text(bytes))),
        Property::Int(number) | Property::Time(number) => CowVal::owned(CelInt::from(*number)),
        Property::UInt(number) => CowVal::owned(CelInt::from(i64::try_from(*number).ok()?)),
        Property::Bool(flag) => CowVal::owned(CelBool::from(*flag)),
        Property::Float(_) | Property::Map(_) | Property::Whole => return None,
    })
}

/// What CEL came to, as guests get it.
fn of_cel(value: &Value) -> Option<Property<'static>> {
    Some(match value {
        Value::String(text) => Property::owned(text.as_str().to_owned()),
        Value::Int(number) => Property::Int(*number),
        Value::UInt(number) => Property::UInt(*number),
        Value::Float(number) => Property::Float(*number),
        Value::Bool(flag) => Property::Bool(*flag),
        Value::Null => Property::owned(String::new()),
        _ => return None,
    })
}

/// Puts a name that the resolver knows in place of each property.
#[derive(Default)]
struct Binder {
    found: Vec<Found>,
    nodes: usize,
    loops: usize,
    /// Variables of the macros around.
    own: Vec<String>,
}

impl Binder {
    /// `None` when the expression speaks of something unknown, or would cost too much.
    fn bind(&mut self, expr: &IdedExpr, depth: usize) -> Option<IdedExpr> {
        self.nodes += 1;
        // Chains such as `a + b + …` nest without brackets.
        if self.nodes > NODES_MAX || depth > NODES_MAX / 2 {
            return None;
        }
        if let Some(bound) = self.property(expr) {
            return Some(bound);
        }
        let depth = depth + 1;
        let bound = match &expr.expr {
            Expr::Ident(name) => {
                let known = self.own.contains(name) || name.starts_with(MARK);
                known.then(|| Expr::Ident(name.clone()))?
            }
            Expr::Select(select) => Expr::Select(SelectExpr {
                operand: Box::new(self.bind(&select.operand, depth)?),
                ..select.clone()
            }),
            Expr::Call(call) => Expr::Call(CallExpr {
                func_name: call.func_name.clone(),
                target: match &call.target {
                    Some(target) => Some(Box::new(self.bind(target, depth)?)),
                    None => None,
                },
                args: call.args.iter().map(|one| self.bind(one, depth)).collect::<Option<_>>()?,
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
            Expr::Struct(_) => return None,
            Expr::Literal(_) | Expr::Unspecified => expr.expr.clone(),
        };
        Some(IdedExpr { id: expr.id, expr: bound })
    }

    fn bind_entry(&mut self, entry: &mut IdedEntryExpr, depth: usize) -> Option<()> {
        match &mut entry.expr {
            EntryExpr::MapEntry(entry) => {
                entry.key = self.bind(&entry.key, depth)?;
                entry.value = self.bind(&entry.value, depth)?;
            }
            EntryExpr::StructField(field) => field.value = self.bind(&field.value, depth)?,
        }
        Some(())
    }

    fn bind_loop(&mut self, inner: &ComprehensionExpr, depth: usize) -> Option<ComprehensionExpr> {
        let mut bound = inner.clone();
        bound.iter_range = self.bind(&inner.iter_range, depth)?;
        bound.accu_init = self.bind(&inner.accu_init, depth)?;
        self.loops += 1;
        if self.loops > LOOPS_MAX {
            return None;
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
        Some(bound)
    }

    /// The name in place of the property that `expr` is, or tests for; `None` if it is none.
    fn property(&mut self, expr: &IdedExpr) -> Option<IdedExpr> {
        let path = path(expr)?;
        let root = &**path.first()?;
        if !ROOTS.contains(&root) || self.own.iter().any(|own| own == root) {
            return None;
        }
        let presence = matches!(&expr.expr, Expr::Select(select) if select.test);
        self.found.push(Found { path: path.join("\0").into_bytes(), presence });
        let name = format!("{MARK}{}", self.found.len() - 1);
        Some(IdedExpr { id: expr.id, expr: Expr::Ident(name) })
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
