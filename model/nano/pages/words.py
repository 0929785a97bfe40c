"""Words, names, dates and amounts, drawn without end: no two pages share their text."""

from dataclasses import dataclass
from random import Random


def _split(words: str) -> tuple[str, ...]:
    return tuple(words.split())


_ONSETS = _split("""
b c d f g h j k l m n p r s t v w z br ch cl cr dr fl fr gl gr kn pl pr qu sc sh sk sl sm sn
sp st str sw th tr tw wh x y
""")
_VOWELS = _split("a e i o u a e i o u ai ea ee ie io oa oo ou au ay")
_CODAS = (
    " " * 9 + "b ck d f g l ll m n nd ng nk nt p r rd rk rm rn rt s ss st t tch th x y"
).split(" ")
_ENDINGS = (" " * 8 + "ed er ing ly ness tion al ous ful able ism ment").split(" ")
_ACCENTS = {"a": "äàá", "o": "öó", "u": "üú", "e": "éè", "n": "ñ", "c": "ç", "s": "ß"}

_COMMON = _split("""
the of and to in a is that for it as was with be by on not he his but at are this have from or
had an they which one you were all her she there would their we him been has when who will
more no if out so said what up its about into than them can only other new some could time
these two may then do first any my now such like our over man me even most made after also did
many before must through back years where much your way well down should because each just
those people how too little state good very make world still own see men work long get here
between both life being under never day same another know while last might us great old year
off come since against go came right used take three states himself few house use during
without again place around however home small found part school once general high upon every
please thank you for your order we write to tell number office letter paper water light open
""")

GOODS = _split("""
Bread Milk Butter Cheese Apples Pears Coffee Tea Sugar Flour Rice Pasta Soap Paper Pens Ink
Lamp Chair Desk Cable Screws Paint Brush Nails Glue Tape Bolts Pipe Hose Valve Filter Pump
Switch Sensor Motor Belt Gear Panel Board Shelf Frame Glass Towel Sheet Pillow Shirt Socks
Gloves Hat Scarf Boots Eggs Salt Pepper Honey Jam Juice Water Beer Wine Candle Matches Bag
""")
_GOODS_KINDS = _split(
    "large small red blue green black white soft hard new fine organic steel wood"
)
_TRADES = _split("Foods Market Store Trading Supplies Bakery Tools Books Garden Motors Electric")
_FORMS = ("Ltd", "Inc", "GmbH", "& Co", "& Sons", "LLC", "AG", "")
_STREETS = _split("Street Road Lane Avenue Way Square Court Hill Drive")
MONTHS = _split("""
January February March April May June July August September October November December
""")
_DATE_FORMS = ("{y}-{m:02}-{d:02}", "{d:02}.{m:02}.{y}", "{d:02}/{m:02}/{y}", "{d} {month} {y}",
               "{month} {d}, {y}", "{d} {short} {y}")  # fmt: skip


@dataclass(frozen=True)
class Date:
    """A day, and how the page writes it."""

    year: int
    month: int
    day: int
    shown: str

    @property
    def iso(self) -> str:
        return f"{self.year}-{self.month:02}-{self.day:02}"


@dataclass(frozen=True)
class Money:
    """How a page writes amounts: one currency, one place for its sign, one decimal mark."""

    code: str
    sign: str
    before: bool
    comma: bool

    def digits(self, cents: int) -> str:
        """1234567 cents as 12,345.67 or 12.345,67."""
        text = f"{cents // 100:,}.{cents % 100:02}"
        return text.translate(str.maketrans(",.", ".,")) if self.comma else text

    def full(self, cents: int) -> str:
        gap = " " if len(self.sign) > 1 or not self.before else ""
        parts = (self.sign, self.digits(cents)) if self.before else (self.digits(cents), self.sign)
        return gap.join(parts)


class Words:
    """Everything is drawn from the one generator it is given."""

    def __init__(self, random: Random) -> None:
        self.random = random

    def chance(self, probability: float) -> bool:
        return self.random.random() < probability

    def word(self) -> str:
        return self.random.choice(_COMMON) if self.chance(0.5) else self.invented()

    def invented(self) -> str:
        """A word that no dictionary has, so that it can only be read."""
        choice = self.random.choice
        syllables = 1 + self.chance(0.6) + self.chance(0.2)
        word = "".join(choice(_ONSETS) + choice(_VOWELS) + choice(_CODAS) for _ in range(syllables))
        word += choice(_ENDINGS)
        if self.chance(0.04):
            at = self.random.randrange(1, len(word))
            if word[at] in _ACCENTS:
                word = word[:at] + choice(_ACCENTS[word[at]]) + word[at + 1 :]
        return word

    def name(self) -> str:
        return self.invented()[:10].capitalize()

    def person(self) -> str:
        first = self.name() if self.chance(0.8) else self.random.choice("ABCDEFGHJKLMNPRSTW") + "."
        return f"{first} {self.name()}"

    def company(self) -> str:
        pick = self.random.choice
        names = f"{self.name()} {pick(_TRADES)}" if self.chance(0.6) else self.name()
        return f"{names} {pick(_FORMS)}".strip()

    def street(self) -> str:
        return f"{self.random.randint(1, 299)} {self.name()} {self.random.choice(_STREETS)}"

    def city(self) -> str:
        return f"{self.random.randint(10000, 99999)} {self.name()}"

    def phone(self) -> str:
        r = self.random
        return f"+{r.randint(1, 99)} {r.randint(10, 999)} {r.randint(10000, 9999999)}"

    def email(self) -> str:
        return f"{self.name().lower()}@{self.name().lower()}.com".translate(
            {ord(c): None for c in "äàáöóüúéèñçß"}
        )

    def iban(self) -> str:
        r = self.random
        digits = "".join(str(r.randrange(10)) for _ in range(18))
        text = f"{r.choice(('DE', 'FR', 'GB', 'CH', 'NL'))}{r.randint(10, 99)}{digits}"
        if self.chance(0.3):
            return text
        return " ".join(text[i : i + 4] for i in range(0, len(text), 4))

    def tax_number(self) -> str:
        country = self.random.choice(("DE", "FR", "GB", "ATU", ""))
        return f"{country}{self.random.randint(10**7, 10**9)}"

    def code(self) -> str:
        r = self.random
        letters = "".join(r.choice("ABCDEFGHJKLMNPQRSTUVWXYZ") for _ in range(r.randint(0, 3)))
        dash = r.choice(("-", "", "/")) if letters else ""
        middle = f"{r.randint(2015, 2029)}-" if r.random() < 0.3 else ""
        return f"{letters}{dash}{middle}{r.randint(10, 999999)}"

    def date(self) -> Date:
        r = self.random
        year, month, day = r.randint(1990, 2029), r.randint(1, 12), r.randint(1, 28)
        name = MONTHS[month - 1]
        shown = r.choice(_DATE_FORMS).format(y=year, m=month, d=day, month=name, short=name[:3])
        return Date(year, month, day, shown)

    def time(self) -> str:
        return f"{self.random.randint(0, 23):02}:{self.random.randint(0, 59):02}"

    def money(self) -> Money:
        code, signs = self.random.choice(
            (("EUR", ("€", "EUR")), ("USD", ("$", "USD")), ("GBP", ("£", "GBP")), ("CHF", ("CHF",)))
        )
        sign = self.random.choice(signs)
        before = self.chance(0.8) if sign in "$£" else self.chance(0.4)
        return Money(code, sign, before, comma=code == "EUR" and self.chance(0.4))

    def cents(self, most: int) -> int:
        return int(10 ** self.random.uniform(1.5, len(str(most)) - 1)) % most + 5

    def goods(self) -> str:
        item = self.random.choice(GOODS) if self.chance(0.6) else self.name()
        if self.chance(0.4):
            item = f"{item} {self.random.choice(_GOODS_KINDS)}"
        return item

    def title(self) -> str:
        words = [self.word() for _ in range(self.random.randint(2, 4))]
        return " ".join(words).capitalize() if self.chance(0.6) else " ".join(words).title()

    def sentence(self) -> str:
        words = [self.word() for _ in range(self.random.randint(4, 12))]
        if self.chance(0.15):
            words[self.random.randrange(len(words))] = self.name()
        if self.chance(0.12):
            words[self.random.randrange(len(words))] = str(self.random.randint(1, 9999))
        if len(words) > 6 and self.chance(0.4):
            words[self.random.randint(2, 4)] += self.random.choice((",", ",", ";", ":"))
        text = " ".join(words)
        return text[0].upper() + text[1:] + self.random.choice(("." * 8) + "?!")
