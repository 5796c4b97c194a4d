"""Which language a piece of code is written in, by what only that language (or few others) says."""

import json
import re
from functools import cache

from puna.guard.code.budget import running

SAMPLE = 12_000  # characters that are looked at
FIRST = 2500  # of these, in which all languages are looked for
FAR = 2.5  # a language with so many times fewer points there isn't looked for in the rest
LONGEST = 1000  # characters of a line of these
BLANKS = 20  # white space in a row that is looked at
_BLANK = re.compile(rf"[^\S\n]{{{BLANKS},}}")
ENOUGH = 4.0  # points below which nothing is claimed
ENOUGH_SHAPED = 1.5  # the same, where most lines end or look as only code does
MANY = 3  # matches of one sign that count

# language -> (points of one match, regular expression over the text, with ^ and $ at lines)
SIGNS: dict[str, tuple[tuple[float, str], ...]] = {
    "python": (
        (8, r"\A#!.*\bpython"),
        (3, r"^\s*(?:async )?def \w+\(.*:\s*(?:#.*)?$"),
        (2, r"^\s*(?:from [\w.]+ )?import [\w., ()*]+$"),
        (2, r"^\s*(?:if|elif|for|while|with|try|else|except|class)\b[^{;]*:\s*(?:#.*)?$"),
        (1.5, r"\bself\.\w+"),
        (1, r"\b(?:None|True|False)\b"),
        (1.5, r"\"\"\"|'''|\bprint\(f?['\"]"),
        (1.5, r"\bf['\"]|\b(?:os|sys|subprocess|requests|hashlib|pickle|yaml|flask|random)\.\w+\("),
        (1, r"\b(?:not in|is not|elif|lambda \w+:|is None)\b"),
        (1.5, r"^\s*@\w+(?:\.\w+)*(?:\(.*\))?$"),
    ),
    "javascript": (
        (8, r"\A#!.*\bnode"),
        (2, r"\b(?:const|let|var)\s+(?:\w+|[{\[][^=\n]*)\s*="),
        (1.5, r"(?:\)|\w)\s*=>\s*[\w({\[`]"),
        (2, r"===|!=="),
        (1.5, r"\bfunction\s*\*?\s*\w*\s*\([\w, {}]*\)\s*\{"),
        (2, r"\brequire\(['\"`]"),
        (2.5, r"\b(?:module\.exports|exports\.\w|console\.\w+\(|document\.\w+|window\.\w+|process\.\w+|JSON\.\w+\()"),
        (1, r"\b(?:undefined|typeof|await|async)\b"),
        (3, r"^\s*(?:import|export)\b.*\bfrom\s+['\"]|^\s*export (?:default|const|function|class)\b"),
        (2, r"\.prototype\.|\bnew Promise\(|\$\(['\"#.]|\.(?:then|addEventListener|forEach)\("),
        (0.7, r"\bthis\.\w+|^\s*\},?\s*$|\b(?:req|res)\.\w+"),
        (1.5, r"^\s*(?:\w+|'\w+'): (?:function|\{|\[|'|\w+,$)|\$\{\w"),
    ),
    "typescript": (
        (2.5, r"[\w)\]]\??:\s*(?:string|number|boolean|any|void|unknown|never)\b(?:\[\])?\s*[=;,)\{|]"),
        (2, r"^\s*(?:export )?(?:interface|type) \w+(?:<\w+>)?\s*[={]"),
        (2.5, r"\bas (?:string|any|unknown|const)\b|\bimport type\b|\bPromise<\w+"),
        (2, r"\b(?:private|public|readonly)\s+\w+\??:\s*\w"),
    ),
    "java": (
        (3, r"^\s*(?:package|import(?: static)?)\s+[\w.*]+;"),
        (1.2, r"\b(?:public|private|protected)\s+(?:static\s+)?(?:final\s+)?[\w<>\[\], ?]+\s\w+\s*[(=;]"),
        (3, r"\bSystem\.(?:out|err|in|getenv|getProperty)\b"),
        (2.5, r"@(?:Override|Autowired|\w*Mapping|Test|Bean|Service|Path\w*|Deprecated|SuppressWarnings)\b"),
        (1, r"\b(?:String|Integer|boolean|Object|Boolean|Long)(?:\[\])?\s+\w+"),
        (3, r"\)\s*throws\s+\w+"),
        (1, r"\bfinal\s+\w+|\b(?:extends|implements|instanceof)\s+\w+"),
        (1.2, r"\.(?:equals|getClass|length|size|isEmpty|get[A-Z]\w*|set[A-Z]\w*|append|toString|valueOf)\("),
        (1.5, r"\b(?:List|Map|Set|Optional|ArrayList|HashMap|Class)<"),
        (1.5, r"catch\s*\((?:final )?\w*(?:Exception|Throwable|Error)\b"),
    ),
    "csharp": (
        (3, r"^\s*using (?:static )?[\w.]+;"),
        (2, r"^\s*namespace [\w.]+\s*[{;]?\s*$"),
        (3, r"\b(?:Console|Assert|Encoding|Convert|File|Path|Math|Debug|String|Task|Guid)\.[A-Z]\w+\("),
        (1.2, r"\bstring\b(?:\[\])?\s+\w+|\bvar \w+ = (?:new|await|\w+\.[A-Z])"),
        (1.2, r"\b(?:public|private|protected|internal)\s+(?:static |async |override |virtual |readonly "
         r"|sealed )*[\w<>\[\]?]+\s+[A-Z]\w*"),
        (3, r"\{\s*(?:get|set);|\basync Task\b|\bforeach\s*\(var\b|\busing\s*\(var\b"),
        (3, r"^\s*\[(?:Http\w+|Route|Test\w*|Fact|Theory|Authorize|Serializable|Dll\w+|Obsolete)\b"),
        (1.5, r"\.(?:ToString|Add|Length|Count|Where|Select|FirstOrDefault|Append|Substring|Contains|Equals"
         r"|ToList|Write\w*|Get[A-Z]\w*)\b"),
        (1, r"\bnew \w+(?:<\w+>)?\s*(?:\{|$)|\$\"|\?\?|\bnull\b|\bout \w+ \w+|///"),
        (1, r"\b(?:bool|byte\[\]|uint|ulong|ref)\s+\w+|\bthrow new \w+Exception\("),
        (2.5, r"\b(?:string|object|Task(?:<[\w<>]+>)?|I?ActionResult) [A-Z]\w*\("),
        (2.5, r"\bclass \w+ ?: ?\w*(?:Controller|ControllerBase|DbContext|PageModel|Hub)\b"),
        (1.5, r"\w\.[A-Z]\w*\([^()\n]*\);|\.[A-Z]\w* = "),
    ),
    "c": (
        (3, r"^\s*#\s*include\s*[<\"]"),
        (1.3, r"\b(?:int|char|void|unsigned|size_t|long|struct \w+|u?int\d+_t|static|const char"
         r"|FILE)\s*\*?\s*\*?\w+\s*[(;=,\[)]"),
        (1, r"\w->\w"),
        (2, r"\b(?:f?printf|malloc|calloc|free|memcpy|str\w{2,5}|sizeof|snprintf|sprintf|memset|memmove|fopen"
         r"|exit|realloc|sscanf)\s*\("),
        (1.5, r"\bNULL\b|\bgoto \w+;|\bassert\s*\("),
        (2, r"^\s*#\s*(?:define|ifdef|ifndef|endif|if|else)\b"),
        (0.5, r"[(,=]\s*[&*]\w+|\btypedef\b|\bextern\b|/\*"),
    ),
    "cpp": (
        (3, r"\bstd::|^\s*#include <(?:iostream|string|vector|map|memory|algorithm|fstream|sstream)>"),
        (2.5, r"\b(?:cout|cin|endl|nullptr|using namespace|virtual|static_cast|reinterpret_cast|dynamic_cast)\b"
         r"|template\s*<"),
        (2, r"\b\w+::~?\w+\s*\(|^\s*(?:public|private|protected):|\bconst \w+(?:::\w+)* ?&"),
        (1.5, r"\bnew \w+\[|\bdelete(?:\[\])? \w+|\bauto \w+ =|\bclass \w+\s*(?::|\{|;)|\bboost::|\bbool \w+"),
    ),
    "php": (
        (6, r"<\?(?:php|=)"),
        (3, r"\$this->|\$_(?:GET|POST|REQUEST|SERVER|SESSION|COOKIE|FILES|ENV)\b"),
        (2, r"(?:^|[(,;\s])\$\w+\s*=[^~]|\$\w+->|\$\w+\[['\"$]"),
        (2, r"\bfunction\s+\w+\(\s*(?:[\w?\\]+ )?&?\$|\b(?:public|private|protected)(?: static)? function\b"),
        (1.5, r"\bforeach\s*\(\$|\becho\s|\barray\(|\bisset\(|\bempty\(|\?>|::\w+\("),
        (2, r"^\s*use [\w\\]+\\\w+(?: as \w+)?;|^\s*namespace \w+(?:\\\w+)*;"),
    ),
    "go": (
        (4, r"^package \w+\s*$"),
        (1.5, r"\w\s*:=\s"),
        (3, r"\bfunc (?:\(\w+ \*?\w+\) )?\w*\("),
        (3, r"\berr != nil\b|\b(?:fmt|http|os|strings|exec|errors|log|json|io|time|sql)\.[A-Z]\w+"),
        (3, r"^import (?:\(|\")"),
        (2, r"\bdefer \w|\bgo func\(|\bchan \w|\bnil\b"),
        (2.5, r"\[\](?:string|byte|int|interface)|\bmap\[string\]|\btype \w+ (?:struct|interface)\b"),
    ),
    "ruby": (
        (8, r"\A#!.*\bruby"),
        (3, r"^\s*def (?:self\.)?[\w?!=]+(?:\(.*\))?\s*$"),
        (2, r"^\s*end\s*$"),
        (3, r"\bdo \|[\w, ]+\||\{\s*\|\w+(?:, \w+)*\|"),
        (3, r"^\s*require(?:_relative)? ['\"]"),
        (2, r"^\s*(?:puts|elsif|unless|attr_\w+|before_action|validates|rescue|ensure|render|redirect_to)\b"),
        (1.5, r"\bparams\[|\.each\b|:\w+ =>|\.nil\?|\b\w+\?(?:\s|$)|@\w+ \|?\|?="),
        (2, r"^\s*(?:class|module) [A-Z]\w*(?:::\w+)*(?: < [\w:]+)?\s*$"),
    ),
    "rust": (
        (3, r"\bfn \w+(?:<[^>\n]*>)?\("),
        (1.5, r"\blet (?:mut )?\w+"),
        (3.5, r"^\s*impl\b|\bpub (?:fn|struct|mod|enum|unsafe|\(crate\))|\buse (?:std|crate|super|core|\w+)::"
         r"|\bextern \"C\""),
        (2, r"\b(?:println|format|vec|panic|assert|assert_eq|debug|write|unreachable|matches)!\s*[(\[]"),
        (2, r"&mut |&str\b|&self\b|&'\w+|\bmut \w|\*const \w|\*mut \w"),
        (2, r"\bunsafe \{|\.unwrap\(\)|\b(?:Some|Ok|Err)\(|\b(?:Result|Option|Vec|Box|Arc)<|\?;"),
        (1.5, r"\bmatch \w+.*\{|::<|=> \{|\w+::\w+|\bself\.\w+\.\w+"),
        (3, r"^\s*#!?\[\w+"),
        (2, r"\bas (?:u8|u16|u32|u64|usize|i32|i64|\*\w+)\b|: (?:u8|u16|u32|u64|usize|i32|i64|f32|f64)\b"
         r"|\b\d+(?:u8|u32|u64|usize|i32)\b"),
    ),
    "kotlin": (
        (3, r"\bfun (?:<\w+> )?(?:\w+\.)?\w+\("),
        (2.5, r"\bval \w+"),
        (1, r"\bvar \w+\s*[:=]|\bprintln\("),
        (3.5, r"\bdata class\b|\bcompanion object\b|\boverride fun\b|\bsuspend fun\b|\bobject \w+\s*[:{]"),
        (1.5, r"\bwhen\s*\(|\?:|\?\.\w|!!|: (?:String|Int|Boolean|Unit|List<)"),
        (1.5, r"^(?:import|package) [\w.]+$"),
    ),
    "swift": (
        (6, r"^\s*import (?:Foundation|UIKit|SwiftUI|CryptoKit|Security|WebKit|Combine|CommonCrypto|Vapor|SQLite3)\b"),
        (2, r"\bfunc \w+(?:<\w+>)?\(.*\)(?: throws)?(?: -> [\w\[\]?:]+)? \{"),
        (2, r"\blet \w+(?:: [\w\[\]?]+)? = "),
        (3, r"\bguard let\b|\bif let\b|\btry[!?]|\bguard .* else \{"),
        (1, r"\bvar \w+\s*:\s*[A-Z]|: (?:String|Int|Bool|Data|URL)\b|\bnil\b|\?\?"),
        (2, r"\\\(\w|@(?:objc|IBAction|State|Published|main)\b|\.init\("),
        (1.2, r"\w\(\w+: [\w\"]"),
        (3, r"\bfunc \w+\((?:\w+ )?\w+: (?:@\w+ )?\[?[A-Z]"),
        (2, r"\{ \(?\w+(?:, \w+)*\)? in\b|\btry await\b|= try [a-z]|\bas[?!] [A-Z]"),
    ),
    "shell": (
        (8, r"\A#!.*\b(?:ba|z|k|da)?sh\b"),
        (3, r"^\s*(?:if|while|until) \[|^\s*(?:fi|done|esac)\b"),
        (2.7, r"^\s*(?:\$ )?(?:sudo|apt|apt-get|yum|dnf|brew|curl|wget|chmod|chown|mkdir|rm|cd|export|git"
         r"|docker|pip3?|npm|tar|systemctl|cp|mv|grep|sed|awk|ssh|scp|kubectl|openssl|nc|dd|eval) [^=(]"),
        (1, r"^\s*(?:echo|cat|source|set|read|local) [^=(]"),
        (1, r"\$\{\w+|\"\$\w+\"|\$\(\w"),
        (3, r"\|\s*(?:grep|awk|sed|bash|sh|xargs|tee|sudo)\b"),
        (1, r"^[A-Za-z_]\w*=[\"'$\w/]\S*\s*$"),
    ),
    "dockerfile": (
        (4, r"^FROM \S+(?: AS \w+)?\s*$"),
        (2.5, r"^(?:RUN|CMD|COPY|ENTRYPOINT|WORKDIR|EXPOSE|ENV|USER|ADD) "),
    ),
    "yaml": (
        (1, r"^\s*(?:- )?[\w./-]+:(?: [^\n{;(]*)?$"),
        (4, r"^(?:apiVersion|kind|jobs|services|on|version|steps|metadata):"),
        (1.5, r"^\s*- (?:name|uses|run|image): "),
    ),
    "json": ((2, r"^\s*\"[^\"\n]{1,60}\"\s*:\s*[\"\d\[{tfn]"),),
    "sql": (
        (4, r"(?i)^\s*(?:SELECT\b.+\bFROM|INSERT INTO \w+|UPDATE \w+ SET|DELETE FROM"
         r"|CREATE (?:OR REPLACE )?(?:TABLE|USER|PROCEDURE|FUNCTION|LOGIN)|GRANT [\w ,]+ (?:ON|TO)"
         r"|ALTER (?:TABLE|USER|LOGIN)|DROP TABLE|EXEC(?:UTE)? )\b"),
    ),
}  # fmt: skip
BUILDS_ON = {"typescript": "javascript", "cpp": "c"}  # these are told apart by what they add


@cache
def _signs() -> dict[str, tuple[tuple[float, re.Pattern[str]], ...]]:
    return {name: tuple((p, re.compile(text, re.MULTILINE)) for p, text in signs) for name, signs in SIGNS.items()}


def _sample(source: str) -> str:
    """The beginning, without what would keep the signs busy: empty lines, white space that goes on, endless lines."""
    short = _BLANK.sub(" " * BLANKS, source[:SAMPLE])
    return "\n".join([line[:LONGEST] for line in short.split("\n") if line and not line.isspace()])


def scores(source: str) -> dict[str, float]:
    """Points of every language; more matches of one sign count less and less. Of a longer text, languages that the
    first lines tell against aren't looked for in the rest."""
    sample = _sample(source)
    names = set(SIGNS)
    if len(sample) > 2 * FIRST:
        early = _points(sample[:FIRST], names)
        best = max(early.values())
        if best >= ENOUGH:
            names = {name for name, points in early.items() if points * FAR >= best}
            names |= {name for name, base in BUILDS_ON.items() if base in names}
            names |= {base for name, base in BUILDS_ON.items() if name in names}
            if len(names) == 1:
                return early
    return _points(sample, names)


def _points(sample: str, names: set[str]) -> dict[str, float]:
    found = dict.fromkeys(SIGNS, 0.0)
    for name in names:
        for points, pattern in _signs()[name]:
            count = 0
            for count, _ in enumerate(pattern.finditer(sample), 1):
                if count == MANY:
                    break
            found[name] += points * (0.0, 1.0, 1.5, 1.8)[count]
    for name, base in BUILDS_ON.items():
        found[name] = found[base] + found[name] if found[name] >= 2 else 0.0
    return found


def detect(source: str, likely: bool = False) -> str | None:
    """The language of `source` (a name of `languages.LANGUAGES` or `FORMATS`), None if nothing is plain enough:
    prose, or too little of anything, or the time of the scan is over. `likely`: it is said to be code, so that a single
    sign is enough."""
    budget = running.get()
    if budget is not None and budget.check():
        return None
    stripped = source.lstrip()
    if stripped[:1] in ("{", "[") and len(source) < 1_000_000:
        try:
            json.loads(source)
            return "json"
        except (ValueError, RecursionError):
            pass
    found = scores(source)
    best = max(found, key=lambda name: found[name])
    return best if found[best] >= (ENOUGH_SHAPED if likely or _shaped(source) else ENOUGH) else None


_CODE_LINE = re.compile(
    r"[;{}(\[,]$|^[)}\]]+[;,]?$|\w\(.*\)$|^\w[\w.\[\]\"']* [-+|]?= \S|:$|^(?:import|from|using|use|package|#include)\b"
)


def _shaped(source: str) -> bool:
    """Whether most lines look like code in some language."""
    lines = [line.strip() for line in source[:SAMPLE].splitlines() if line.strip()]
    return sum(_CODE_LINE.search(line) is not None for line in lines) > 0.5 * len(lines)
