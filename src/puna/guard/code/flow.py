"""Data flow inside a function and across small helpers: a walk over the uniform view that knows, at every point, what
each name may hold. Here its statements: branches are followed one by one and joined; a loop's body is walked once; a
condition that tests a name marks what it holds as `checked` where the test held.
"""

from puna.guard.code import effects, names
from puna.guard.code.budget import Budget
from puna.guard.code.expressions import SELF, check
from puna.guard.code.functions import Functions
from puna.guard.code.guards import side, tested
from puna.guard.code.knowledge import Knowledge
from puna.guard.code.scope import Env, Listener, Scope
from puna.guard.code.value import Atom, Value, either, merge
from puna.guard.code.view import Node

LATE = frozenset({"catch", "function", "class"})  # walked even where the statements before them leave
FINALLY = frozenset({"finally_clause", "ensure", "finally_block"})
ANSWERS = frozenset({"render", "redirect_to", "head", "redirect_back"})  # what a handler leaves with
MAX_TOP = 2000  # statements at the margin among which classes are looked for
CONSTRUCTORS = frozenset({"__init__", "constructor", "initialize", "__construct", "init"})
MAX_METHODS = 20  # of a class that is walked again for what its constructor was given
MAX_FOLLOWED = 40  # calls of helpers with input that are followed, per file


class Flow(Functions):
    """One file's walk. `listener` hears of every call, assignment, key, comparison, literal, function and import, in
    order of evaluation."""

    def __init__(self, root: Node, knowledge: Knowledge, listener: Listener, budget: Budget) -> None:
        super().__init__(knowledge, listener, budget)
        self.root = root

    def run(self) -> None:
        for function in self.root.value or ():
            if function.name:
                self.functions.setdefault(function.name, function)
        self.classes = {node.name: node for node in _classes(self.root)}
        scope = Scope(function=None, top=self.root)
        self.listener.enter(scope)
        self.block([self.root], {}, scope)
        followed = 0
        while self.pending and followed < MAX_FOLLOWED and not self.budget.spent:
            followed_into, env, outer, values = self.pending.pop(0)
            followed += 1
            if followed_into.kind == "class":
                self.instance(followed_into, env, outer, values)
            else:
                self.enter(followed_into, dict(env), outer, values)

    def block(self, nodes: list[Node], env: Env, scope: Scope) -> bool:
        """Walk statements in order, changing `env`. True if the end isn't reached (return, throw, exit). What stands
        after that is walked only where it is reached in another way (handlers, definitions), or in a fragment of
        code without its function's head."""
        ended = False
        for node in nodes:
            kind = node.kind
            if ended and scope.function is not None and kind not in LATE and node.raw not in FINALLY:
                continue
            if kind == "block":
                ended = self.block(node.body, env, scope) or ended
            elif kind == "if":
                ended = self.branch(node, env, scope) or ended
            elif kind in ("return", "throw", "exit"):
                values = [self.evaluate(a, env, scope) for a in node.args]
                if kind == "return" and values:
                    scope.returns.append(either(values))
                    self.listener.result(node, scope.returns[-1], scope)
                ended = True
            elif kind == "call":
                self.call(node, env, scope, used=False)
                if node.base is not None and names.checks(node.base.name):
                    check(env, {path for a in node.args if (path := a.path())})
                ended = ended or effects.ends(node)
            elif kind == "binary" and node.name in ("and", "or", "&&", "||") and _leaves(node.args[-1]):
                ended = self.short(node, env, scope) or ended
            else:
                self.evaluate(node, env, scope)
                ended = ended and kind != "catch"  # a handler may go on after the try
        return ended

    def short(self, node: Node, env: Env, scope: Scope) -> bool:
        """`ok(x) or die()`, `render(x) and return`: what follows is reached if the test held. True if it never is."""
        for part in node.args:
            self.evaluate(part, env, scope)
        first = node.args[0]
        if node.name in ("and", "&&") and first.kind == "call":
            return first.base is not None and first.base.name in ANSWERS
        asked = tested(first)
        self.meet(asked, env, first)
        check(env, asked)
        return False

    def branch(self, node: Node, env: Env, scope: Scope) -> bool:
        test = node.args[0]
        self.evaluate(test, env, scope)
        scope.tests.append(test)
        asked = tested(test)
        self.meet(asked, env, test)
        then_env, else_env = dict(env), dict(env)
        check(then_env, asked)
        checked = {name: value for name, value in then_env.items() if value is not env[name]}
        where = side(test)
        if where is False or (test.kind == "unary" and test.args[0].kind == "call"):  # `if (!valid(x)) ...`: it isn't
            then_env = dict(env)
        then_left = self.block(node.body, then_env, scope)
        if where is True:
            pass  # `if (x == "a") return`: what goes on is anything else
        elif then_left or node.orelse:
            else_env.update(checked)
        else:  # `if (!ok(x)) x = "/"`: what wasn't replaced passed the test
            else_env.update((name, value) for name, value in checked.items() if _replaced(value, then_env.get(name)))
        else_left = self.block(node.orelse, else_env, scope) if node.orelse else False
        if then_left and else_left:
            return True
        merged = else_env if then_left else then_env if else_left else merge(then_env, else_env)
        if not then_left and not else_left:  # the branches meet again: what the test showed no longer holds
            merged.update((name, env[name]) for name, value in checked.items() if merged[name] is value)
        env.clear()
        env.update(merged)
        return False

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
            check(inside, tested(node.args[0]))
        if not self.block(node.body, inside, scope):
            merged = merge(inside, env)
            env.clear()
            env.update(merged)
        refusal = _refusal(node)
        if refusal is not None:
            asked = tested(refusal)
            if node.base is not None and node.args and node.base.path() in asked:
                asked.add(node.args[0].path())
            cursors = [env[name] for name in asked if name in env]  # C: `for (p = host; *p; p++) if (!ok(*p)) return`
            asked.update(path for value in cursors for path in value.paths if path in env)
            check(env, asked)
        return Value(node=node)

    def _do_catch(self, node: Node, env: Env, scope: Scope) -> Value:
        self.listener.catch(node, scope)
        inside = dict(env)
        if node.name:
            inside[node.name] = Value((node.name,), atoms=(Atom("error", node.name, node.start),), node=node)
        self.block(node.body, inside, scope)
        return Value(node=node)

    def instance(self, klass: Node, env: Env, outer: Scope, values: list[Value]) -> None:
        """Walk a class whose constructor is given `values`: what it keeps of them is known in the other methods."""
        methods = [node for node in klass.body if node.kind == "function"]
        made = next((m for m in methods if m.name in CONSTRUCTORS or m.name == klass.name), None)
        if made is None or len(methods) > MAX_METHODS:
            return
        body = Scope(klass=klass, outer=outer)
        body._calls = frozenset()
        own = made.args[:1] if made.args and made.args[0].name in SELF else []
        self.enter(made, dict(env), body, [*(Value((p.name,), node=p) for p in own), *values])
        for method in methods:
            if method is not made:
                self.enter(method, dict(env), body, None)

    def _do_class(self, node: Node, env: Env, scope: Scope) -> Value:
        inside = dict(env)
        body = Scope(klass=node, outer=scope)
        body._calls = frozenset()
        self.listener.enter(body)
        ordered = sorted(
            node.body,
            key=lambda n: n.kind == "function" and n.name not in CONSTRUCTORS and n.name != node.name,
        )
        self.block(ordered, inside, body)
        return Value(node=node)


def _classes(root: Node) -> list[Node]:
    """The classes that stand at the margin, or in a namespace there."""
    found, stack = [], [root]
    for _ in range(MAX_TOP):
        if not stack:
            break
        node = stack.pop()
        if node.kind == "class":
            found.append(node)
        elif node.kind in ("block", "other"):
            stack.extend(node.body)
    return found


def _leaves(node: Node) -> bool:
    return node.kind in ("return", "throw", "exit") or (node.kind == "call" and effects.ends(node))


def _replaced(before: Value, after: Value | None) -> bool:
    """Whether a name was given something that has nothing of what it held."""
    return after is not None and after is not before and not {a.at for a in before.atoms} & {a.at for a in after.atoms}


def _refusal(node: Node) -> Node | None:
    """The condition of a loop's body that does nothing but refuse: `for (c : s) if (!ok(c)) return -1;`."""
    body = [n for n in node.body if n.kind != "unary"]  # without `i++`
    while len(body) == 1 and body[0].kind == "block":
        body = body[0].body
    if len(body) != 1 or body[0].kind != "if" or body[0].orelse:
        return None
    left = body[0].body
    while left and left[-1].kind == "block":
        left = left[-1].body
    return body[0].args[0] if left and left[-1].kind in ("return", "throw") else None
