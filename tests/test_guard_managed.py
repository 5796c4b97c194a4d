"""What only Java, Kotlin and C# have, and how data goes through it: each text holds a weakness, or only looks so."""

import pytest

from puna.guard.code.scan import scan

HANDLER = "class A : Controller {{ [HttpGet] public object F(string q, string sort) {{ {} }} }}"
WEAK = {
    "C#: a generic method": (
        "csharp",
        HANDLER.format('return db.Query<Row>("SELECT * FROM t WHERE a = \'" + q + "\'");'),
    ),
    "C#: a test for emptiness shows nothing": (
        "csharp",
        HANDLER.format('var n = string.IsNullOrEmpty(q) ? "x" : q; return Content($"<b>{n}</b>", "text/html");'),
    ),
    "C#: an array of a size, never filled": ("csharp", "class A { void F(Aes aes) { aes.IV = new byte[16]; } }"),
    "C#: a property that starts empty": (
        "csharp",
        'class A { string Text { get; set; } = ""; object F() => new MarkupString("<p>" + Text + "</p>"); }',
    ),
    "C#: settings given to a new() of the declared class": (
        "csharp",
        'class A { void F(string h) { ProcessStartInfo i = new() { FileName = "sh", Arguments = $"-c {h}" }; } }',
    ),
    "Java: a switch that gives the value itself": (
        "java",
        'class A { Object f(@RequestParam String s) { String c = switch (s) { case "a" -> "x"; default -> s; }; '
        'return db.queryForList("SELECT * FROM t ORDER BY " + c); } }',
    ),
    "Java: what a field of the request's object holds": (
        "java",
        'class A { @PostMapping("/p") void f(@RequestBody P p) throws Exception { String h = p.getHost(); '
        'new ProcessBuilder("sh", "-c", "ping " + h).start(); } '
        "static class P { String host; String getHost() { return host; } } }",
    ),
    "Java: formatted": (
        "java",
        "class A { Object f(@RequestParam String n) { "
        "return em.createQuery(\"FROM User WHERE name = '%s'\".formatted(n)); } }",
    ),
    "Java: an address made of what was sent": (
        "java",
        "class A { Object f(@RequestParam String u) { return HttpRequest.newBuilder().uri(URI.create(u)).build(); } }",
    ),
    "Kotlin: a constant of the companion": (
        "kotlin",
        "class A { fun f(): Cipher { return Cipher.getInstance(KIND) }\n"
        'companion object {\nprivate const val KIND = "DESede/ECB/PKCS5Padding"\n}\n}\n',
    ),
    "Kotlin: a long text without its indent": (
        "kotlin",
        'fun Route.h() { get("/h") { val n = call.parameters["n"]; val p = """\n<b>$n</b>\n""".trimIndent(); '
        "call.respondText(p, ContentType.Text.Html) } }",
    ),
    "Kotlin: asked only whether it is empty": (
        "kotlin",
        'fun Route.r() { get("/r") { val t = call.parameters["t"]?.takeIf { it.isNotBlank() } ?: "/"; '
        "call.respondRedirect(t) } }",
    ),
    "Kotlin: a number is as easy to guess as a text": (
        "kotlin",
        "fun create(): String { val token = hex((Math.random() * Long.MAX_VALUE).toLong()); return token }",
    ),
    "Kotlin: a content provider's caller": (
        "kotlin",
        "class P : ContentProvider() { override fun openFile(uri: Uri, mode: String) = "
        "open(File(context!!.filesDir, uri.lastPathSegment!!)) }",
    ),
}
SOUND = {
    "C#: a switch over constants": (
        "csharp",
        HANDLER.format(
            'var c = sort switch { "a" => "Name", _ => "Id" }; return db.Query<Row>($"SELECT * FROM t ORDER BY {c}");'
        ),
    ),
    "C#: joined constants": (
        "csharp",
        'class A { object F(Db db) { var w = new List<string>(); w.Add("a = @a"); '
        'return db.Query<Row>("SELECT * FROM t WHERE " + string.Join(" AND ", w)); } }',
    ),
    "C#: a service among a handler's parameters": (
        "csharp",
        'app.MapGet("/x", async (ILinkStore links) => Results.Content("<b>" + await links.Home(), "text/html"));',
    ),
    "Java: a table of constants": (
        "java",
        'class A { static final Map<String, String> COLUMNS = Map.of("a", "x"); Object f(@RequestParam String s) { '
        'String c = COLUMNS.getOrDefault(s, "id"); return db.queryForList("SELECT * FROM t ORDER BY " + c); } }',
    ),
    "Java: as many marks as values": (
        "java",
        "class A { Object f(Connection c, List<Long> ids) throws Exception { "
        'String in = String.join(",", Collections.nCopies(ids.size(), "?")); '
        'return c.prepareStatement("SELECT * FROM t WHERE id IN (" + in + ")"); } }',
    ),
    "Java: the host is constant": (
        "java",
        "class A { Object f(@RequestParam String n) throws Exception { "
        'return new URL("https://a.org/" + n).openStream(); } }',
    ),
    "Java: demanded before": (
        "java",
        "class A { Object f(@RequestParam String s) { Assert.isTrue(KNOWN.contains(s), s); "
        'return db.queryForList("SELECT * FROM t ORDER BY " + s); } }',
    ),
    "C#: what a table holds under the name": (
        "csharp",
        'class A : Controller { static readonly Dictionary<string, string> Known = new() { ["a"] = "b" }; '
        "[HttpGet] public object F(string q) { if (!Known.TryGetValue(q, out var c)) return null; "
        'return db.Query<Row>($"SELECT * FROM t ORDER BY {c}"); } }',
    ),
    "Kotlin: demanded before, with a reason": (
        "kotlin",
        'class A { @GetMapping("/t") fun f(@RequestParam s: String): Any { require(s in KNOWN) { "unknown" }\n'
        'return db.queryForList("SELECT * FROM t ORDER BY $s") } }',
    ),
    "Kotlin: a dollar that is one": (
        "kotlin",
        r'fun f(xpath: XPath, title: String) = xpath.evaluate("//book[title=\$title]", doc)',
    ),
    "Kotlin: one of the known": (
        "kotlin",
        'fun Route.r() { get("/r") { val t = call.parameters["t"]?.takeIf { it == "/a" || it == "/b" } ?: "/"; '
        "call.respondRedirect(t) } }",
    ),
}


@pytest.mark.parametrize("what", WEAK)
def test_a_weakness_is_found(what: str) -> None:
    language, code = WEAK[what]
    assert [f.rule for f in scan(code, language) if f.confidence != "low"]


@pytest.mark.parametrize("what", SOUND)
def test_what_only_looks_weak_is_not(what: str) -> None:
    language, code = SOUND[what]
    assert [f.rule for f in scan(code, language) if f.confidence != "low"] == []
