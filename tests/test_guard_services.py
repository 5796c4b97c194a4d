"""Data that flows through the methods, structures and patterns of Go, Rust and Swift."""

import pytest

from puna.guard.code.scan import scan


def rules(language: str, code: str) -> set[str]:
    return {f.rule for f in scan(code, language) if f.confidence != "low"}


def test_a_method_of_go_is_followed_from_its_own_object() -> None:
    code = """
package main
func (a *Auditor) page(w http.ResponseWriter, name string) { fmt.Fprintf(w, "<p>%s", name) }
func (a *Auditor) Show(w http.ResponseWriter, r *http.Request) { a.page(w, NAME) }
"""
    assert "go-html-from-input" in rules("go", code.replace("NAME", 'r.FormValue("n")'))
    assert "go-html-from-input" not in rules("go", code.replace("NAME", '"x"'))


def test_a_method_is_followed_from_another_object_where_its_name_is_the_files_own() -> None:
    code = """
package main
func (s *Store) writePage(w http.ResponseWriter, name string) { fmt.Fprintf(w, "<p>%s", name) }
func (h *Handler) Show(w http.ResponseWriter, r *http.Request) { h.store.writePage(w, NAME) }
"""
    assert "go-html-from-input" in rules("go", code.replace("NAME", 'r.FormValue("n")'))
    assert "go-html-from-input" not in rules("go", code.replace("NAME", '"x"'))


def test_a_test_of_one_field_says_nothing_of_the_others() -> None:
    code = """
async fn go(State(app): State<App>, Form(form): Form<Login>) -> Redirect {
    if !app.auth.verify(&form.user, &form.password).await { return Redirect::to("/login"); }
    if !TEST { return Redirect::to("/"); }
    Redirect::to(&form.next)
}
"""
    assert "rust-redirect" in rules("rust", code.replace("TEST", "app.known(&form.user)"))
    assert "rust-redirect" not in rules("rust", code.replace("TEST", "form.next.starts_with('/')"))


@pytest.mark.parametrize(
    "body",
    [
        "let p = folder(&name); fs::read(p).unwrap()",
        "let Some(p) = cache(&name) else { return vec![] }; fs::read(p).unwrap()",
        "match parse(&name) { Ok(p) => fs::read(p).unwrap(), Err(_) => vec![] }",
        "let p = match find(&name) { Some(p) => p, None => return vec![] }; fs::read(p).unwrap()",
    ],
)
def test_rusts_last_expressions_and_patterns_hand_values_on(body: str) -> None:
    code = (
        "async fn get(Path(name): Path<String>) -> Vec<u8> { BODY }\nfn folder(n: &str) -> PathBuf { PathBuf::from(n) }"
    )
    assert "rust-path-from-input" in rules("rust", code.replace("BODY", body))


def test_an_arm_of_a_match_is_one_of_the_words_that_it_names() -> None:
    code = """
async fn list(Query(q): Query<Q>) {
    let column = match q.sort.as_str() { ARMS };
    pool.execute(&format!("SELECT * FROM t ORDER BY {}", column));
}
"""
    assert "rust-sql-composed" not in rules("rust", code.replace("ARMS", '"name" => "name", _ => "id"'))
    assert "rust-sql-composed" in rules("rust", code.replace("ARMS", '"name" => "name", other => other'))


def test_a_single_expression_is_what_a_function_of_swift_gives_back() -> None:
    code = """
func page(_ name: String) -> String { "<h1>\\(name)</h1>" }
app.get("h") { req -> Response in
    let name: String = try req.query.get(at: "n")
    return Response(body: BODY)
}
"""
    assert "swift-script-composed" in rules("swift", code.replace("BODY", "page(name)"))
    assert "swift-script-composed" not in rules("swift", code.replace("BODY", 'page("x")'))


def test_what_failed_a_check_is_not_checked_where_it_failed() -> None:
    code = """
package main
func login(w http.ResponseWriter, r *http.Request) {
	user := r.FormValue("user")
	if !known(user) {
		FIRST
		return
	}
	THEN
}
"""
    log = 'log.Println("user " + user)'
    assert "go-log-from-input" in rules("go", code.replace("FIRST", log).replace("THEN", ""))
    assert "go-log-from-input" not in rules("go", code.replace("FIRST", "").replace("THEN", log))


def test_swifts_calls_are_operands_of_what_stands_before_them() -> None:
    code = 'func f(name: String) { webView.evaluateJavaScript("greet(" + CALL(name) + ")") }'
    assert "swift-script-composed" in rules("swift", code.replace("CALL", "trimmed"))
    assert "swift-script-composed" not in rules("swift", code.replace("CALL", "escapeHTML"))
