"""The value of an expression: what the data flow knows of it."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cache

from puna.guard.code import effects, strings
from puna.guard.code.budget import Budget
from puna.guard.code.guards import keyed, tested
from puna.guard.code.knowledge import Knowledge
from puna.guard.code.scope import Env, Listener, Scope
from puna.guard.code.value import GIVEN, MAX_PATHS, UNKNOWN, Atom, Value, cleaned, compose, constant, either, join_atoms
from puna.guard.code.view import Node

SELF = ("self", "this", "cls", "$this")


@cache
def _handlers(kind: type["Expressions"]) -> dict[str, Callable[..., Value]]:
    """The class's methods by the kind of node. Not bound: an object that holds its own methods, and with it the whole
    tree, would wait for the collector of cycles."""
    return {name[4:]: getattr(kind, name) for name in dir(kind) if name.startswith("_do_")}


class Expressions(ABC):
    """Evaluates nodes in an environment (name -> value), and tells `listener` what it meets. Statements are the
    subclass's."""

    def __init__(self, knowledge: Knowledge, listener: Listener, budget: Budget) -> None:
        self.known = knowledge
        self.listener = listener
        self.budget = budget
        self.steps = 0
        self.functions: dict[str, Node] = {}
        self.handlers = _handlers(type(self))

    @abstractmethod
    def block(self, nodes: list[Node], env: Env, scope: Scope) -> bool:
        """Walk statements in order, changing `env`. True if the end isn't reached (return, throw, exit)."""

    def evaluate(self, node: Node, env: Env, scope: Scope) -> Value:
        self.steps += 1
        if self.budget.spent or (not self.steps % 500 and self.budget.check()):
            return Value(node=node)
        handler = self.handlers.get(node.kind)
        if handler is None:
            self.block([node], env, scope)
            return Value(node=node)
        return handler(self, node, env, scope)

    def _do_name(self, node: Node, env: Env, _scope: Scope) -> Value:
        value = env.get(node.name)
        if value is not None:
            return value
        function = self.functions.get(node.name)
        if function is not None:
            return Value(paths=(node.name,), function=function, node=node)
        atoms: tuple[Atom, ...] = ()
        if node.name.isupper() and len(node.name) > 1 and not node.name.startswith("_"):
            atoms = (Atom("named-constant", node.name, node.start),)
        elif node.name not in SELF and not node.name[:1].isupper():
            atoms = (Atom("unknown", node.name, node.start),)
        return self.sourced(Value(paths=(node.name,), atoms=atoms, node=node))

    def _do_member(self, node: Node, env: Env, scope: Scope) -> Value:
        assert node.base is not None
        stored = env.get(node.path())
        if stored is not None:
            return stored
        base = self.evaluate(node.base, env, scope)
        found = base.item(node.name)
        if found is not None:
            return found
        paths = tuple(f"{p}.{node.name}" for p in base.paths if len(p) < 160)
        atoms = base.atoms
        if not atoms:
            label = "named-constant" if node.name.isupper() else "unknown"
            atoms = (Atom(label, node.path() or node.name, node.start),)
        value = self.sourced(Value(paths=paths or (node.name,), atoms=atoms, node=node))
        for purpose in self.known.about(value.paths).purposes:  # url.lastPathComponent
            value = cleaned(value, purpose)
        return value

    def _do_index(self, node: Node, env: Env, scope: Scope) -> Value:
        assert node.base is not None
        stored = env.get(keyed(node))
        if stored is not None:
            return stored
        base = self.evaluate(node.base, env, scope)
        for arg in node.args:
            self.evaluate(arg, env, scope)
        if len(node.args) == 1 and base.items is not None:
            key = node.args[0]
            if key.kind == "string" and (found := base.item(str(key.value))) is not None:
                return found
            if base.known() or all(v.known() for v in base.items):
                return Value(node=node)
        paths = tuple(p + "[]" for p in base.paths if len(p) < 160)
        return self.sourced(Value(paths=paths, atoms=base.atoms, node=node))

    def _do_string(self, node: Node, _env: Env, scope: Scope) -> Value:
        value = constant(node.value, node)
        self.listener.text(node, value, scope)
        return value

    def _do_number(self, node: Node, _env: Env, _scope: Scope) -> Value:
        return constant(node.value, node) if node.value is not None else Value(node=node)

    def _do_constant(self, node: Node, _env: Env, _scope: Scope) -> Value:
        return constant(node.value, node)

    def _do_template(self, node: Node, env: Env, scope: Scope) -> Value:
        value = compose(
            [constant(a.value, a) if a.kind == "string" else self.evaluate(a, env, scope) for a in node.args], node
        )
        self.listener.text(node, value, scope)
        return value

    def _do_binary(self, node: Node, env: Env, scope: Scope) -> Value:
        values = [self.evaluate(a, env, scope) for a in node.args]
        value, is_text = strings.binary(node, values)
        if node.name in ("<<", ">>"):
            effects.stream(node, values, env)
        if is_text:
            self.listener.text(node, value, scope)
        elif len(values) == 2:
            self.listener.compare(node, values[0], values[1], scope)
        return value

    def _do_unary(self, node: Node, env: Env, scope: Scope) -> Value:
        value = self.evaluate(node.args[0], env, scope) if node.args else Value()
        if node.name == "!" or node.name == "not":
            return Value(const=not value.const, node=node) if isinstance(value.const, bool) else Value(node=node)
        if node.name == "-" and isinstance(value.const, int | float):
            return constant(-value.const, node)
        return Value(
            paths=value.paths,
            const=value.const if node.name in "&*@" else UNKNOWN,
            text=value.text,
            built=value.built,
            atoms=value.atoms,
            node=node,
        )

    def _do_conditional(self, node: Node, env: Env, scope: Scope) -> Value:
        if not node.args:
            return Value(node=node)
        self.evaluate(node.args[0], env, scope)
        inside = dict(env)
        asked = tested(node.args[0])
        self.meet(asked, inside, node)
        check(inside, asked)
        values = [self.evaluate(a, inside, scope) for a in node.args[1:]]
        return either(values) if values else Value(node=node)

    def _do_collection(self, node: Node, env: Env, scope: Scope) -> Value:
        values = [self.evaluate(a, env, scope) for a in node.args]
        return Value(items=values, atoms=join_atoms(values), node=node)

    def _do_map(self, node: Node, env: Env, scope: Scope) -> Value:
        values = []
        for key, arg in zip(node.keys or [], node.args, strict=False):
            value = self.evaluate(arg, env, scope)
            values.append(value)
            if key is not None:
                self.listener.pair(node, key, value, scope)
        return Value(items=values, keys=node.keys, atoms=join_atoms(values), node=node)

    def _do_cast(self, node: Node, env: Env, scope: Scope) -> Value:
        value = self.evaluate(node.args[0], env, scope) if node.args else Value(node=node)
        return cleaned(value, "all") if strings.numeric_type(node.type) else value

    def _do_other(self, node: Node, env: Env, scope: Scope) -> Value:
        values = []
        for arg in node.args:
            if node.raw == "ERROR" or arg.kind in ("block", "if", "return", "throw", "exit"):
                self.block([arg], env, scope)  # by itself: what follows in broken code is reached all the same
            elif arg.kind == "assign":
                self.evaluate(arg, env, scope)  # a comprehension's loop: its value is its body's
            else:
                values.append(self.evaluate(arg, env, scope))
        if len(values) == 1:
            return values[0]
        return Value(atoms=join_atoms(values), node=node)

    def _do_assign(self, node: Node, env: Env, scope: Scope) -> Value:
        value = self.evaluate(node.args[0], env, scope) if node.args else Value(node=node)
        target = node.base
        if target is None:
            return value
        if node.name not in ("=", ":="):
            before = self.evaluate(target, env, scope)
            value = strings.augmented(node, before, value)
            if value.built:
                self.listener.text(node, value, scope)
        self.bind(target, value, env, scope, node)
        return value

    def bind(self, target: Node, value: Value, env: Env, scope: Scope, node: Node) -> None:
        """Give a name, a member, or the names in a pattern their new value."""
        if target.raw == "shorthand_property_identifier_pattern":  # `const { x } = a`: it is a.x
            value = Value(tuple(f"{p}.{target.name}" for p in value.paths), atoms=value.atoms, node=value.node)
        if target.kind == "collection":
            for i, part in enumerate(target.args):
                given = (
                    value.items[i]
                    if value.items is not None and i < len(value.items)
                    else Value(paths=value.paths, atoms=value.atoms, node=value.node)
                )
                self.bind(part, given, env, scope, node)
            return
        path = target.path()
        typed = (strings.type_name(node.type),) if node.type else ()
        named = Value(
            tuple(dict.fromkeys((path, *typed, *value.paths)))[:MAX_PATHS] if path else value.paths,
            value.const, value.text, value.built, value.atoms, value.items, value.keys, value.function, value.node,
        )  # fmt: skip
        if strings.numeric_type(node.type):
            named = cleaned(named, "all")
        if target.kind == "name":
            env[target.name] = named
        elif target.kind == "member" and path:
            env[path] = named
        if target.kind in ("member", "index") and target.base is not None:
            holder = self.evaluate(target.base, env, scope)
            seen = Value(
                tuple(f"{p}.{target.name}" if target.kind == "member" else p + "[]" for p in holder.paths), node=target
            )
            if target.kind == "index" and target.base.kind == "name" and value.atoms and holder.node is not None:
                env[target.base.name] = Value(
                    holder.paths,
                    atoms=join_atoms([holder, value]),
                    items=holder.items,
                    keys=holder.keys,
                    node=holder.node,
                )
            if target.kind == "index" and target.args and target.args[0].kind == "string":
                if (known := keyed(target)) in env:
                    env[known] = value
                self.listener.pair(node, str(target.args[0].value), value, scope)
        else:
            seen = Value((path,) if path else (), node=target)
        if node.args:
            self.listener.assign(node, seen, value, scope)

    def _do_import(self, node: Node, env: Env, scope: Scope) -> Value:
        for local, path in node.value:
            if local:
                env[local] = Value(paths=(local, path) if local != path else (path,), node=node)
        self.listener.imported(node, scope)
        return Value(node=node)

    def meet(self, paths: set[str], env: Env, node: Node) -> None:
        """Note the members (and the shell's $1) among these that are input, so that what a condition shows is kept."""
        for path in paths:
            first = path.split(".", 1)[0].split("[", 1)[0]
            shell = path.isdigit()  # $1
            own = env.get(first)
            if (
                (first != path or shell)
                and path not in env
                and (own is None or first in SELF or own.paths[:1] == (first,))
            ):
                base = path[: path.index("[")] if path.endswith("]") else path
                known = self.sourced(Value(paths=(base,), node=node))
                if base != path:
                    known = self.sourced(Value(paths=(base + "[]",), atoms=known.atoms, node=node))
                if known.atoms:
                    env[path] = known
            if (
                own is not None
                and first != path
                and path not in env
                and not path.endswith((")", "]"))
                and any(a.label in GIVEN for a in own.atoms)
            ):  # one field of what was sent: the others aren't tested
                env[path] = Value(tuple(p + path[len(first) :] for p in own.paths), atoms=own.atoms, node=node)

    def sourced(self, value: Value) -> Value:
        """Labelled as a source of input, where one of its paths is one."""
        label = self.known.about(value.paths).label
        if label:
            at = value.node.start if value.node is not None else 0
            value.atoms = (
                Atom(label, value.paths[0][:80], at),
                *[a for a in value.atoms if a.label not in ("unknown", label)],
            )
        return value


_PARSED = (
    "Uri",
    "URI",
    "URL",
    "Url",
    "URI.create()",
    "url.Parse()",
    "Url.parse()",
    "url.ParseRequestURI()",
    "urlsplit()",
    "urlparse()",
    "URI.parse()",
    "URI()",
    "parse_url()",
)
_HOSTS = tuple(f"{parsed}.{part}" for parsed in _PARSED for part in ("hostname", "host", "origin", "netloc"))


def check(env: Env, names: set[str]) -> None:
    """Mark what the names hold as tested by a condition; with the parts of an address, the text that it was read
    from."""
    for name in names & env.keys():
        value = env[name]
        env[name] = cleaned(value, "checked")
        if value.atoms and any(path.endswith(_PARSED) or path.endswith(_HOSTS) for path in value.paths):
            for other, held in env.items():
                if other not in names and held.atoms and set(held.atoms) <= set(value.atoms):
                    env[other] = cleaned(held, "checked")
