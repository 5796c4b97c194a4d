"""What people write to mend a weakness in Python must silence the finding."""

import pytest

from puna import guard

PAIRS = {
    "CWE-78: quote helper": (
        """import os
def ping(request):
    host = request.args["host"]
    os.system("ping -c 1 " + host)
""",
        """import os
def ping(request):
    host = request.args["host"]
    os.system("ping -c 1 " + quote_argument(host))
""",
    ),
    "CWE-78: list instead of shell": (
        """import subprocess
def fetch(url, target):
    subprocess.call("git clone %s %s" % (url, target), shell=True)
""",
        """import subprocess
def fetch(url, target):
    subprocess.call(["git", "clone", "--", url, target])
""",
    ),
    "CWE-78: validated by helper that raises": (
        """import subprocess
def convert(self, name):
    subprocess.check_call("convert %s out.png" % name, shell=True)
""",
        """import subprocess
def convert(self, name):
    validate_file_name(name)
    subprocess.check_call("convert %s out.png" % name, shell=True)
""",
    ),
    "CWE-78: shlex.split": (
        """from subprocess import Popen
def launch(command, args):
    Popen(command + " " + args, shell=True)
""",
        """import shlex
from subprocess import Popen
def launch(command, args):
    Popen([command] + shlex.split(args), shell=False)
""",
    ),
    "CWE-78: fullmatch guard": (
        """import os
def lookup(domain):
    return os.popen("whois " + domain).read()
""",
        """import os, re
def lookup(domain):
    if not re.fullmatch(r"[a-z0-9.-]+", domain):
        raise ValueError(domain)
    return os.popen("whois " + domain).read()
""",
    ),
    "CWE-78: quoted in a comprehension": (
        """import os
def pack(files):
    os.system("tar czf out.tgz " + " ".join(files))
""",
        """import os, shlex
def pack(files):
    os.system("tar czf out.tgz " + " ".join(shlex.quote(f) for f in files))
""",
    ),
    "CWE-78: quoted in a loop": (
        """import os
def pack(files):
    command = "tar czf out.tgz"
    for name in files:
        command += " " + name
    os.system(command)
""",
        """import os, pipes
def pack(files):
    command = "tar czf out.tgz"
    for name in files:
        command += " " + pipes.quote(name)
    os.system(command)
""",
    ),
    "CWE-89: parameters": (
        """def find(self, name):
    self.cursor.execute("SELECT * FROM users WHERE name = '" + name + "'")
""",
        """def find(self, name):
    self.cursor.execute("SELECT * FROM users WHERE name = %s", (name,))
""",
    ),
    "CWE-89: int": (
        """def show(db, request):
    db.execute("SELECT * FROM posts WHERE id = %s" % request.args["id"])
""",
        """def show(db, request):
    db.execute("SELECT * FROM posts WHERE id = %d" % int(request.args["id"]))
""",
    ),
    "CWE-89: order allow-list": (
        """def listing(cursor, request):
    order = request.args.get("order")
    cursor.execute("SELECT * FROM posts ORDER BY " + order)
""",
        """def listing(cursor, request):
    order = request.args.get("order")
    if order not in ("date", "title"):
        order = "date"
    cursor.execute("SELECT * FROM posts ORDER BY " + order)
""",
    ),
    "CWE-89: allow-list as a map": (
        """def listing(cursor, request):
    cursor.execute("SELECT * FROM posts ORDER BY %s" % request.args["order"])
""",
        """ORDERS = {"date": "created_at", "title": "title"}
def listing(cursor, request):
    cursor.execute("SELECT * FROM posts ORDER BY %s" % ORDERS.get(request.args["order"], "created_at"))
""",
    ),
    "CWE-89: placeholders": (
        """def remove(cursor, ids):
    cursor.execute("DELETE FROM posts WHERE id IN (%s)" % ",".join(ids))
""",
        """def remove(cursor, ids):
    marks = ",".join(["%s"] * len(ids))
    cursor.execute("DELETE FROM posts WHERE id IN (%s)" % marks, ids)
""",
    ),
    "CWE-89: own escape helper": (
        """def tag(db, name):
    db.execute("INSERT INTO tags (name) VALUES ('%s')" % name)
""",
        """def tag(db, name):
    db.execute("INSERT INTO tags (name) VALUES ('%s')" % sql_escape(name))
""",
    ),
    "CWE-89: ORM": (
        """from django.db import connection
def users(request):
    q = request.GET["q"]
    with connection.cursor() as cursor:
        cursor.execute(f"SELECT id FROM users WHERE mail LIKE '%{q}%'")
""",
        """from django.db import connection
def users(request):
    q = request.GET["q"]
    with connection.cursor() as cursor:
        cursor.execute("SELECT id FROM users WHERE mail LIKE %s", ["%" + q + "%"])
""",
    ),
    "CWE-89: quoted name": (
        """def drop(cursor, request):
    cursor.execute("DROP TABLE " + request.args["table"])
""",
        """def drop(cursor, connection, request):
    cursor.execute("DROP TABLE " + connection.ops.quote_name(request.args["table"]))
""",
    ),
    "CWE-79: escape": (
        """from flask import request
@app.route("/")
def hello():
    return "<h1>Hello " + request.args["name"] + "</h1>"
""",
        """from flask import request
from html import escape
@app.route("/")
def hello():
    return "<h1>Hello " + escape(request.args["name"]) + "</h1>"
""",
    ),
    "CWE-79: format_html": (
        """from django.utils.safestring import mark_safe
def link(self, obj):
    return mark_safe('<a href="%s">%s</a>' % (obj.url, obj.title))
""",
        """from django.utils.html import format_html
def link(self, obj):
    return format_html('<a href="{}">{}</a>', obj.url, obj.title)
""",
    ),
    "CWE-79: sanitising helper": (
        """from markupsafe import Markup
def comment(text):
    return Markup("<p>" + text + "</p>")
""",
        """from markupsafe import Markup
def comment(text):
    return Markup("<p>" + sanitize_html(text) + "</p>")
""",
    ),
    "CWE-79: bleach": (
        """from django.utils.safestring import mark_safe
import markdown
def body(value):
    return mark_safe(markdown.markdown(value))
""",
        """from django.utils.safestring import mark_safe
import bleach, markdown
def body(value):
    return mark_safe(bleach.clean(markdown.markdown(value)))
""",
    ),
    "CWE-79: escape each": (
        """from django.utils.safestring import mark_safe
def rows(values):
    return mark_safe("".join("<li>%s</li>" % v for v in values))
""",
        """from django.utils.html import format_html_join
def rows(values):
    return format_html_join("", "<li>{}</li>", ((v,) for v in values))
""",
    ),
    "CWE-79: conditional escape": (
        """from django.utils.safestring import mark_safe
def render(self, name, value):
    return mark_safe("<input name='%s' value='%s'>" % (name, value))
""",
        """from django.utils.safestring import mark_safe
from django.utils.html import conditional_escape
def render(self, name, value):
    return mark_safe("<input name='%s' value='%s'>" % (conditional_escape(name), conditional_escape(value)))
""",
    ),
    "CWE-79: escaped before": (
        """from django.http import HttpResponse
def search(request):
    q = request.GET.get("q", "")
    return HttpResponse("No results for " + q)
""",
        """from django.http import HttpResponse
from django.utils.html import escape
def search(request):
    q = escape(request.GET.get("q", ""))
    return HttpResponse("No results for " + q)
""",
    ),
    "CWE-22: basename": (
        """import os
from flask import request, send_file
@app.route("/file")
def get():
    return send_file(os.path.join("files", request.args["name"]))
""",
        """import os
from flask import request, send_file
@app.route("/file")
def get():
    return send_file(os.path.join("files", os.path.basename(request.args["name"])))
""",
    ),
    "CWE-22: realpath and startswith": (
        """import os
def read(request):
    path = os.path.join(ROOT, request.GET["path"])
    return open(path).read()
""",
        """import os
def read(request):
    path = os.path.realpath(os.path.join(ROOT, request.GET["path"]))
    if not path.startswith(ROOT + os.sep):
        raise PermissionError(path)
    return open(path).read()
""",
    ),
    "CWE-22: send_from_directory": (
        """from flask import send_file
@app.route("/uploads/<path:name>")
def upload(name):
    return send_file("uploads/" + name)
""",
        """from flask import send_from_directory
@app.route("/uploads/<path:name>")
def upload(name):
    return send_from_directory("uploads", name)
""",
    ),
    "CWE-22: secure_filename": (
        """import os
from flask import request
@app.route("/up", methods=["POST"])
def up():
    f = request.files["file"]
    f.save(os.path.join("uploads", f.filename))
""",
        """import os
from flask import request
from werkzeug.utils import secure_filename
@app.route("/up", methods=["POST"])
def up():
    f = request.files["file"]
    if not allowed_file(f.filename):
        abort(400)
    f.save(os.path.join("uploads", secure_filename(f.filename)))
""",
    ),
    "CWE-22: validated by helper": (
        """import os
from flask import request
@app.route("/artifact")
def artifact():
    path = request.args["path"]
    return open(os.path.join(ROOT, path)).read()
""",
        """import os
from flask import request
@app.route("/artifact")
def artifact():
    path = request.args["path"]
    validate_path_is_safe(path)
    return open(os.path.join(ROOT, path)).read()
""",
    ),
    "CWE-22: tar members": (
        """import tarfile
def unpack(path, target):
    with tarfile.open(path) as tar:
        tar.extractall(target)
""",
        """import tarfile
def unpack(path, target):
    with tarfile.open(path) as tar:
        for member in tar.getmembers():
            _validate_member(member, target)
        tar.extractall(target)
""",
    ),
    "CWE-22: relative_to": (
        """from pathlib import Path
def read(request):
    return Path(request.GET["name"]).read_text()
""",
        """from pathlib import Path
def read(request):
    path = (ROOT / request.GET["name"]).resolve()
    path.relative_to(ROOT)
    return path.read_text()
""",
    ),
    "CWE-22: dots refused": (
        """import os
from flask import request
@app.route("/theme")
def theme():
    name = request.args["name"]
    return open(os.path.join("themes", name)).read()
""",
        """import os
from flask import request, abort
@app.route("/theme")
def theme():
    name = request.args["name"]
    if ".." in name or name.startswith("/"):
        abort(404)
    return open(os.path.join("themes", name)).read()
""",
    ),
    "CWE-601: own redirect helper": (
        """from flask import redirect, request
@app.route("/go")
def go():
    return redirect(request.args.get("next"))
""",
        """from flask import redirect, request
@app.route("/go")
def go():
    return redirect(get_safe_redirect(request.args.get("next")))
""",
    ),
    "CWE-601: two slashes refused": (
        """class Handler(RequestHandler):
    def get(self):
        self.redirect(self.request.path + "/")
""",
        """class Handler(RequestHandler):
    def get(self):
        if self.request.path.startswith("//"):
            raise HTTPError(403)
        self.redirect(self.request.path + "/")
""",
    ),
    "CWE-502: safe_load": (
        """import yaml
def load(request):
    return yaml.load(request.data)
""",
        """import yaml
def load(request):
    return yaml.safe_load(request.data)
""",
    ),
    "CWE-918: host checked": (
        """import requests
def proxy(request):
    return requests.get(request.GET["url"]).text
""",
        """import requests
def proxy(request):
    url = request.GET["url"]
    check_url_allowed(url)
    return requests.get(url).text
""",
    ),
}


def found(code: str) -> list[str]:
    return [f.rule for f in guard.scan_code(code, "python") if f.confidence != "low"]


@pytest.mark.parametrize("name", PAIRS)
def test_a_mended_function_is_quiet(name: str) -> None:
    weak, mended = PAIRS[name]
    assert found(weak)
    assert found(mended) == []


@pytest.mark.parametrize(
    "call",
    [
        "mark_safe(text)",
        "unquote(text)",
        "unescape_html(text)",
        "safe_load(text)",
        "assertTrue(text)",
        "check_call(text)",
    ],
)
def test_names_that_promise_nothing(call: str) -> None:
    assert found(f"import os\ndef run(text):\n    text = {call}\n    os.system('ls ' + text)\n")
