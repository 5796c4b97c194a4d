"""Functions and calls in the data flow: a call of a function of the same file takes the function's result, and input
that goes into such a function is followed into it."""

import re
from collections.abc import Iterable

from puna.guard.code import effects, strings
from puna.guard.code.budget import Budget
from puna.guard.code.expressions import SELF, Expressions
from puna.guard.code.knowledge import Knowledge
from puna.guard.code.pattern import Patterns
from puna.guard.code.scope import Call, Env, Listener, Scope
from puna.guard.code.value import MAX_PATHS, Atom, Value, cleaned, either, join_atoms
from puna.guard.code.view import Node

_HUMPED = re.compile(r"[a-z]_?[A-Z]|[a-z]_[a-z]")  # a name of several words: what a file calls so, it has defined so
_SERVICE = re.compile(  # types of parameters that the framework fills in, not the request (ASP.NET)
    r"^I(?!Form|Enumerable|List|Dictionary|Collection|ReadOnly)[A-Z]|(Context|Db|Client|Service|Repository|Manager|"
    r"Store|Factory|Token|Principal|Mapper|Logger)(<|$)"
)


class Functions(Expressions):
    """Evaluates definitions and calls, beside other expressions."""

    def __init__(self, knowledge: Knowledge, listener: Listener, budget: Budget) -> None:
        super().__init__(knowledge, listener, budget)
        self.results: dict[int, Value] = {}
        self.classes: dict[str, Node] = {}  # of this file
        self.given: set[int] = set()  # functions that are given to a call that makes them handlers
        self.pending: list[tuple[Node, Env, Scope, list[Value]]] = []  # walks of functions that input went into

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
            inside = dict(env)
            found = self.results[id(function)] = self.enter(function, inside, scope, None)
            if not function.name:  # a callback, which is called where it stands: what it adds to stays
                own = {p.name for p in function.args}
                env.update(
                    (name, either([value, inside[name]]))
                    for name, value in env.items()
                    if inside[name] is not value and inside[name].built and name not in own
                )
        return found

    def enter(self, function: Node, env: Env, outer: Scope, values: list[Value] | None) -> Value:
        """Walk a function's body with its parameters bound to `values`, or to themselves."""
        scope = Scope(function=function, klass=outer.klass, outer=outer)
        env.update(outer.fields)
        if function.name.startswith("do_") and function.name[3:].isupper():  # http.server: what was asked for
            env["self.path"] = Value(("self.path",), atoms=(Atom("input", "self.path", function.start),), node=function)
        handler = self.handles(function, outer.klass)
        for i, parameter in enumerate(function.args):
            given_input = (handler and not _SERVICE.search(parameter.type)) or _marked(
                parameter, self.known.input_marks
            )
            if parameter.type and self.known.input_types.match([strings.type_name(parameter.type), parameter.type]):
                given_input = True
            label = "input" if given_input else "parameter"
            name = strings.type_name(parameter.type)
            given = Value(
                paths=(parameter.name, name) if name else (parameter.name,),
                atoms=(Atom(label, parameter.name, parameter.start, parameter=i if label == "parameter" else -1),),
                node=parameter,
            )
            if parameter.name in SELF and not given_input:
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

    def handles(self, function: Node, klass: Node | None) -> bool:
        """Whether all parameters come from outside: a handler of requests."""
        if id(function) in self.given or _marked(function, self.known.handler_marks):
            return True
        bases = [base.path() for base in klass.args] if klass is not None else []
        return function.name != getattr(klass, "name", "") and self.known.handler_classes.match(bases)

    def _do_call(self, node: Node, env: Env, scope: Scope) -> Value:
        return self.call(node, env, scope, used=True)

    def call(self, node: Node, env: Env, scope: Scope, used: bool) -> Value:
        base = node.base
        receiver: Value | None = None
        if base is not None and base.kind == "member":
            assert base.base is not None
            receiver = self.evaluate(base.base, env, scope)
            stored = env.get(base.path())
            paths = tuple([f"{p}.{base.name}" for p in receiver.paths if len(p) < 160]) or (f"?.{base.name}",)
            if stored is not None:
                paths = tuple(dict.fromkeys((*paths, *stored.paths)))[:MAX_PATHS]
        elif base is not None and base.kind == "name":
            bound = env.get(base.name)
            paths = bound.paths if bound is not None and bound.paths else (base.name,)
        else:
            callee = self.evaluate(base, env, scope) if base is not None else Value()
            paths = callee.paths or ("?",)
        if self.known.handler_calls.match(paths):
            self.given.update(id(a) for a in node.args if a.kind == "function")
        args = [self.evaluate(a, env, scope) for a in node.args]
        keys = node.keys or [None] * len(args)
        call = Call(node, paths, receiver, args, keys, scope, used)
        self.listener.call(call)
        if node.keys:
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
        effects.write(self.known, call, env)
        purposes = effects.cleans(self.known, call)
        if purposes:
            inputs = [*([receiver] if receiver is not None else []), *args]
            value = Value(
                tuple(p + "()" for p in paths),
                atoms=join_atoms(inputs),
                node=node,
                text=args[0].text if args and "all" not in purposes else None,
            )
            for purpose in purposes:
                value = cleaned(value, purpose)
            return value
        if args and node.base is not None and node.base.name == "promisify":
            return Value(args[0].paths, node=node)
        if self.known.input_texts and args and args[0].text in self.known.input_texts:
            read = Atom("input", str(args[0].text), node.start)
            return Value(tuple(p + "()" for p in paths), atoms=(read,), node=node)
        composed = strings.composed(self.known, call)
        if composed is not None:
            self.listener.text(node, composed, scope)
            return composed
        if node.base is not None and not node.new:
            helper = self.helper(call, env)
            if helper is not None:
                return self.helped(helper, call, env, scope)
        if node.base is not None and node.base.name == "map" and receiver is not None and args and args[0].function:
            return Value(tuple(p + "()" for p in paths), atoms=self.mapped(call, args[0].function), node=node)
        if self.classes and args:
            self.made(call, env, scope)
        result_paths = paths if node.new else tuple(p + "()" for p in paths)
        looked_up = effects.looks_up(call)
        inputs = [*([receiver] if receiver is not None else []), *(args[1:] if looked_up else args)]
        atoms = join_atoms(inputs)
        harmless = receiver is not None and not receiver.atoms and any(p.endswith("()") for p in receiver.paths)
        harmless = harmless or looked_up or (bool(args) and effects.pure(call))
        if not atoms and not node.new and not harmless:
            atoms = (Atom("unknown", (paths[0] + "()")[:80], node.start),)
        return Value(result_paths, atoms=atoms, node=node)

    def made(self, call: Call, env: Env, scope: Scope) -> None:
        """Have a class of this file walked with what its constructor is given, if that is foreign."""
        klass = next((self.classes[p] for path in call.paths if (p := path.removesuffix(".new")) in self.classes), None)
        if klass is not None and _foreign(call.args):
            self.pending.append((klass, env, scope.outer or scope, call.args))

    def mapped(self, call: Call, function: Node) -> tuple[Atom, ...]:
        """What a list has after `map`: of what was in it only what the function's result takes from its element (the
        first parameter; of a block that takes key and value, each)."""
        result = self.results.get(id(function))
        assert call.receiver is not None
        if result is None or not function.args:
            return call.receiver.atoms
        names = [p.name for p in function.args]
        elements = names if call.keys[-1] == "&" else names[:1]
        kept = Value(atoms=tuple(a for a in result.atoms if a.parameter < 0 or a.text not in names))
        uses = any(a.parameter >= 0 and a.text in elements for a in result.atoms)
        return join_atoms([kept, call.receiver] if uses else [kept])

    def helper(self, call: Call, env: Env) -> Node | None:
        """The function of this file that is called, if it is plain which."""
        base = call.node.base
        assert base is not None
        if base.kind == "name":
            held = env.get(base.name)  # const page = (title) => ...
            return self.functions.get(base.name) or (held.function if held is not None else None)
        held = call.receiver.item(base.name) if call.receiver is not None else None
        if held is not None and held.function is not None:  # const tools = { page(title) { ... } }
            return held.function
        if base.kind == "member" and base.base is not None:
            holder = base.base
            if holder.kind == "name" and (holder.name in SELF or holder.name[:1].isupper() or _receives(call, holder)):
                return self.functions.get(base.name)
            if self.made_here(call.receiver) or _HUMPED.search(base.name):
                return self.functions.get(base.name)
        return None

    def made_here(self, value: Value | None) -> bool:
        """Whether a value is an instance of a class of this file."""
        return value is not None and any(path.split("(", 1)[0].split(".", 1)[0] in self.classes for path in value.paths)

    def helped(self, function: Node, call: Call, env: Env, scope: Scope) -> Value:
        result = self.result(function, env, scope)
        params = (
            function.args[1:]
            if function.args and _is_self(function.args[0]) and call.receiver is not None
            else function.args
        )
        values: dict[str, Value] = {}
        for i, parameter in enumerate(params):
            given = call.argument(i, parameter.name)
            if given is not None:
                values[parameter.name] = given
        if _foreign(values.values()):
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
        if call.receiver is not None and not result.known():  # what its fields hold came with the object
            atoms.append(call.receiver)
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


def _is_self(parameter: Node) -> bool:
    return parameter.name in SELF or parameter.value == "receiver"


def _receives(call: Call, holder: Node) -> bool:
    """Whether `holder` is the object whose method the call stands in, where it has a name of its own (Go)."""
    function = call.scope.function
    return (
        function is not None
        and bool(function.args)
        and function.args[0].value == "receiver"
        and function.args[0].name == holder.name
    )


def _foreign(values: Iterable[Value]) -> bool:
    """Whether something from outside that nothing tested is among these."""
    return any(
        a.label not in ("unknown", "parameter", "named-constant") and "checked" not in a.clean
        for v in values
        for a in v.atoms
    )


def _marked(node: Node, patterns: Patterns) -> bool:
    return any(patterns.match([mark.base.path() if mark.base is not None else ""]) for mark in node.marks)
