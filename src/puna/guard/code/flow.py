"""Data flow inside a function and across small helpers: a walk over the uniform view that knows, at every point, what
each name may hold.

Branches are followed one by one and joined; a loop's body is walked once; a condition that tests a name marks what it
holds as `checked` where the test held. A call of a function
of the same file takes the function's result, and input that goes into such a function is followed into it.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from puna.guard.code import strings
from puna.guard.code.guards import tested
from puna.guard.code.knowledge import Knowledge
from puna.guard.code.pattern import last_name
from puna.guard.code.value import MAX_PATHS, UNKNOWN, Atom, Value, cleaned, compose, constant, either, join_atoms
from puna.guard.code.view import Node

Env = dict[str, Value]
MAX_FOLLOWED = 40  # calls of helpers with input that are followed, per file
MAX_STEPS = 200_000  # nodes evaluated per file
SELF = ("self", "this", "cls", "$this")


@dataclass
class Scope:
    """The function (or module, or class body) in which something happens."""

    function: Node | None = None
    klass: Node | None = None
    outer: "Scope | None" = None
    returns: list[Value] = field(default_factory=list)
    fields: Env = field(default_factory=dict)  # of a class: what its methods stored in `self` so far
    tests: list[Node] = field(
        default_factory=list
    )  # conditions met so far, for rules that ask whether something was tested
    _calls: frozenset[str] | None = None

    def calls(self) -> frozenset[str]:
        """The paths of everything that is called in the function."""
        if self._calls is None:
            nodes = self.function.walk() if self.function is not None else []
            self._calls = frozenset(
                n.base.path() or n.base.name for n in nodes if n.kind == "call" and n.base is not None
            )
        return self._calls


@dataclass
class Call:
    """A call as rules see it."""

    node: Node
    paths: tuple[str, ...]
    receiver: Value | None
    args: list[Value]
    keys: list[str | None]
    scope: Scope
    used: bool = True

    def argument(self, position: int | None, key: str | None) -> Value | None:
        """By keyword, else by position among those without one."""
        if key is not None:
            for name, value in zip(self.keys, self.args, strict=False):
                if name == key:
                    return value
                if name is None and value.keys is not None and (found := value.item(key)) is not None:
                    return found  # an options object: f({key: value})
        if position is None:
            return None
        plain = [v for k, v in zip(self.keys, self.args, strict=False) if k is None]
        return plain[position] if -len(plain) <= position < len(plain) else None


class Listener:
    """What the walk reports; `matching.Matcher` listens."""

    def call(self, call: Call) -> None: ...
    def assign(self, node: Node, target: Value, value: Value, scope: Scope) -> None: ...
    def pair(self, node: Node, key: str, value: Value, scope: Scope) -> None: ...
    def compare(self, node: Node, left: Value, right: Value, scope: Scope) -> None: ...
    def text(self, node: Node, value: Value, scope: Scope) -> None: ...
    def enter(self, scope: Scope) -> None: ...
    def imported(self, node: Node, scope: Scope) -> None: ...
    def catch(self, node: Node, scope: Scope) -> None: ...


class Flow:
    """One file's walk. `listener` hears of every call, assignment, key, comparison, literal, function and import, in
    order of evaluation."""

    def __init__(
        self, root: Node, knowledge: Knowledge, listener: Listener, deadline: Callable[[], bool] = lambda: False
    ) -> None:
        self.root = root
        self.known = knowledge
        self.listener = listener
        self.deadline = deadline
        self.steps = 0
        self.stopped = False
        self.functions: dict[str, Node] = {}
        self.results: dict[int, Value] = {}
        self.pending: list[tuple[Node, Env, Scope, list[Value]]] = []
        self.handlers = {name[4:]: getattr(self, name) for name in dir(self) if name.startswith("_do_")}

    def run(self) -> None:
        for node in self.root.walk():
            if node.kind == "function" and node.name:
                self.functions.setdefault(node.name, node)
        scope = Scope(function=None)
        scope._calls = frozenset(
            n.base.path() or n.base.name for n in self.root.walk() if n.kind == "call" and n.base is not None
        )
        self.listener.enter(scope)
        self.block([self.root], {}, scope)
        followed = 0
        while self.pending and followed < MAX_FOLLOWED and not self.stopped:
            function, env, outer, values = self.pending.pop(0)
            followed += 1
            self.enter(function, dict(env), outer, values)

    # ---- statements

    def block(self, nodes: list[Node], env: Env, scope: Scope) -> bool:
        """Walk statements in order, changing `env`. True if the end isn't reached (return, throw, exit)."""
        for node in nodes:
            kind = node.kind
            if kind == "block":
                if self.block(node.body, env, scope):
                    return True
            elif kind == "if":
                if self.branch(node, env, scope):
                    return True
            elif kind in ("return", "throw", "exit"):
                values = [self.evaluate(a, env, scope) for a in node.args]
                if kind == "return" and values:
                    scope.returns.append(either(values))
                return True
            elif kind == "call":
                self.call(node, env, scope, used=False)
            else:
                self.evaluate(node, env, scope)
        return False

    def branch(self, node: Node, env: Env, scope: Scope) -> bool:
        test = node.args[0]
        self.evaluate(test, env, scope)
        scope.tests.append(test)
        then_env, else_env = dict(env), dict(env)
        checked = {name: cleaned(env[name], "checked") for name in tested(test) if name in env}
        then_env.update(checked)
        then_left = self.block(node.body, then_env, scope)
        if then_left or node.orelse:
            else_env.update(checked)
        else_left = self.block(node.orelse, else_env, scope) if node.orelse else False
        if then_left and else_left:
            return True
        merged = else_env if then_left else then_env if else_left else _merge(then_env, else_env)
        if not then_left and not else_left:  # the branches meet again: what the test showed no longer holds
            merged.update((name, env[name]) for name, value in checked.items() if merged[name] is value)
        env.clear()
        env.update(merged)
        return False

    # ---- expressions

    def evaluate(self, node: Node, env: Env, scope: Scope) -> Value:
        self.steps += 1
        if self.stopped or self.steps > MAX_STEPS or (not self.steps % 500 and self.deadline()):
            self.stopped = True
            return Value(node=node)
        handler = self.handlers.get(node.kind)
        if handler is None:
            self.block([node], env, scope)
            return Value(node=node)
        return handler(node, env, scope)

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
        return self.sourced(Value(paths=paths or (node.name,), atoms=atoms, node=node))

    def _do_index(self, node: Node, env: Env, scope: Scope) -> Value:
        assert node.base is not None
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
        _check(inside, tested(node.args[0]))
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
            if arg.kind in ("block", "if", "return", "throw", "exit"):
                self.block([arg], env, scope)
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

    def _do_loop(self, node: Node, env: Env, scope: Scope) -> Value:
        values = [self.evaluate(a, env, scope) for a in node.args]
        inside = dict(env)
        if node.base is not None and values:
            over = values[0]
            element = (
                either(over.items)
                if over.items
                else self.sourced(Value(tuple(p + "[]" for p in over.paths), atoms=over.atoms, node=node.args[0]))
            )
            self.bind(node.base, element, inside, scope, Node("assign", node.start, node.start, node.raw))
        elif node.args:
            scope.tests.append(node.args[0])
            _check(inside, tested(node.args[0]))
        if not self.block(node.body, inside, scope):
            merged = _merge(inside, env)
            env.clear()
            env.update(merged)
        return Value(node=node)

    def _do_catch(self, node: Node, env: Env, scope: Scope) -> Value:
        self.listener.catch(node, scope)
        self.block(node.body, dict(env), scope)
        return Value(node=node)

    def _do_class(self, node: Node, env: Env, scope: Scope) -> Value:
        inside = dict(env)
        body = Scope(klass=node, outer=scope)
        body._calls = frozenset()
        self.listener.enter(body)
        ordered = sorted(
            node.body,
            key=lambda n: n.kind == "function" and n.name not in ("__init__", "constructor", "initialize", node.name),
        )
        self.block(ordered, inside, body)
        return Value(node=node)

    # ---- functions and calls

    def _do_function(self, node: Node, env: Env, scope: Scope) -> Value:
        for mark in node.marks:
            self.evaluate(mark, env, scope)
        self.result(node, env, scope)
        return Value(function=node, node=node)

    def result(self, function: Node, env: Env, scope: Scope) -> Value:
        """What a function gives back, with its parameters as atoms; it is walked on the first request only."""
        found = self.results.get(id(function))
        if found is None:
            self.results[id(function)] = Value(node=function)  # a function that calls itself ends here
            found = self.results[id(function)] = self.enter(function, dict(env), scope, None)
        return found

    def enter(self, function: Node, env: Env, outer: Scope, values: list[Value] | None) -> Value:
        """Walk a function's body with its parameters bound to `values`, or to themselves."""
        scope = Scope(function=function, klass=outer.klass, outer=outer)
        env.update(outer.fields)
        handler = any(self.known.handler_marks.match([m.base.path() if m.base else ""]) for m in function.marks)
        for i, parameter in enumerate(function.args):
            label = (
                "input"
                if handler
                or any(self.known.input_marks.match([m.base.path() if m.base else ""]) for m in parameter.marks)
                else "parameter"
            )
            name = strings.type_name(parameter.type)
            given = Value(
                paths=(parameter.name, name) if name else (parameter.name,),
                atoms=(Atom(label, parameter.name, parameter.start, parameter=i if label == "parameter" else -1),),
                node=parameter,
            )
            if parameter.name in SELF:
                given = Value(paths=(parameter.name,), node=parameter)
            if values is not None and i < len(values):
                passed = values[i]
                given = Value(
                    given.paths + passed.paths[:2],
                    passed.const,
                    passed.text,
                    passed.built,
                    passed.atoms,
                    passed.items,
                    passed.keys,
                    passed.function,
                    parameter,
                )
            env[parameter.name] = cleaned(given, "all") if strings.numeric_type(parameter.type) else self.sourced(given)
            for default in parameter.args:
                self.listener.assign(
                    Node("assign", default.start, default.end, default.raw, base=parameter, args=[default]),
                    Value((parameter.name,)),
                    self.evaluate(default, env, scope),
                    scope,
                )
        self.listener.enter(scope)
        self.block(function.body, env, scope)
        if outer.klass is not None:
            for name, value in env.items():
                if name.startswith(("self.", "this.")):
                    outer.fields.setdefault(name, value)
        return either(scope.returns) if scope.returns else Value(node=function)

    def _do_call(self, node: Node, env: Env, scope: Scope) -> Value:
        return self.call(node, env, scope, used=True)

    def call(self, node: Node, env: Env, scope: Scope, used: bool) -> Value:
        base = node.base
        receiver: Value | None = None
        if base is not None and base.kind == "member":
            assert base.base is not None
            receiver = self.evaluate(base.base, env, scope)
            stored = env.get(base.path())
            paths = tuple(f"{p}.{base.name}" for p in receiver.paths if len(p) < 160) or (f"?.{base.name}",)
            paths = tuple(dict.fromkeys((*paths, *(stored.paths if stored is not None else ()))))[:MAX_PATHS]
        elif base is not None and base.kind == "name":
            bound = env.get(base.name)
            paths = bound.paths if bound is not None and bound.paths else (base.name,)
        else:
            callee = self.evaluate(base, env, scope) if base is not None else Value()
            paths = callee.paths or ("?",)
        args = [self.evaluate(a, env, scope) for a in node.args]
        keys = node.keys or [None] * len(args)
        call = Call(node, paths, receiver, args, keys, scope, used)
        self.listener.call(call)
        for key, arg in zip(keys, args, strict=False):
            if key is not None:
                self.listener.pair(node, key, arg, scope)
        for child in node.body:
            self.evaluate(child, env, scope)
        return self.sourced(self.returned(call, env, scope))

    def returned(self, call: Call, env: Env, scope: Scope) -> Value:
        """The value of a call: a cleaner's, a formatter's, a helper's own result, or something that depends on
        receiver and arguments."""
        node, paths, receiver, args = call.node, call.paths, call.receiver, call.args
        strings.write(self.known, call, env)
        for purpose, patterns in self.known.cleaners.items():
            if patterns.match(paths):
                inputs = [*([receiver] if receiver is not None else []), *args]
                return cleaned(
                    Value(
                        tuple(p + "()" for p in paths),
                        atoms=join_atoms(inputs),
                        node=node,
                        text=args[0].text if args and purpose != "all" else None,
                    ),
                    purpose,
                )
        composed = strings.composed(self.known, call)
        if composed is not None:
            self.listener.text(node, composed, scope)
            return composed
        if node.base is not None and not node.new:
            helper = self.helper(call)
            if helper is not None:
                return self.helped(helper, call, env, scope)
        result_paths = paths if node.new else tuple(p + "()" for p in paths)
        inputs = [*([receiver] if receiver is not None else []), *args]
        atoms = join_atoms(inputs)
        if not atoms and not node.new:
            atoms = (Atom("unknown", (paths[0] + "()")[:80], node.start),)
        return Value(result_paths, atoms=atoms, node=node)

    def helper(self, call: Call) -> Node | None:
        """The function of this file that is called, if it is plain which."""
        base = call.node.base
        assert base is not None
        if base.kind == "name":
            return self.functions.get(base.name)
        if (
            base.kind == "member"
            and base.base is not None
            and base.base.kind == "name"
            and (base.base.name in SELF or base.base.name[:1].isupper())
        ):
            return self.functions.get(base.name)
        return None

    def helped(self, function: Node, call: Call, env: Env, scope: Scope) -> Value:
        result = self.result(function, env, scope)
        params = (
            function.args[1:]
            if function.args and function.args[0].name in SELF and call.receiver is not None
            else function.args
        )
        values: dict[str, Value] = {}
        for i, parameter in enumerate(params):
            given = call.argument(i, parameter.name)
            if given is not None:
                values[parameter.name] = given
        if any(
            a.label not in ("unknown", "parameter", "named-constant") and "checked" not in a.clean
            for v in values.values()
            for a in v.atoms
        ):
            bound = [values.get(p.name, Value(paths=(p.name,), node=p)) for p in function.args]
            self.pending.append((function, env, scope.outer or scope, bound))
        atoms: list[Value] = []
        for atom in result.atoms:
            inside = 0 <= atom.parameter < len(function.args)
            given = values.get(function.args[atom.parameter].name) if inside else None
            if given is not None:
                extra = atom.clean
                atoms.append(
                    Value(atoms=tuple(Atom(a.label, a.text, a.at, a.clean | extra, a.parameter) for a in given.atoms))
                )
            else:
                atoms.append(Value(atoms=(atom,)))
        path = tuple(p + "()" for p in call.paths)
        return Value(
            path + result.paths[:1],
            result.const,
            result.text,
            result.built and bool(join_atoms(atoms)),
            join_atoms(atoms),
            result.items,
            result.keys,
            result.function,
            call.node,
        )

    def sourced(self, value: Value) -> Value:
        """Labelled as a source of input, where one of its paths is one."""
        if not self.known.source_names.isdisjoint(map(last_name, value.paths)):
            for label, patterns in self.known.sources.items():
                if not patterns.match(value.paths):
                    continue
                at = value.node.start if value.node is not None else 0
                value.atoms = (
                    Atom(label, value.paths[0][:80], at),
                    *[a for a in value.atoms if a.label not in ("unknown", label)],
                )
                break
        return value


def _check(env: Env, names: set[str]) -> None:
    for name in names:
        if name in env:
            env[name] = cleaned(env[name], "checked")


def _merge(one: Env, other: Env) -> Env:
    merged = dict(other)
    for name, value in one.items():
        there = other.get(name)
        merged[name] = value if there is None or there is value else either([value, there])
    return merged
