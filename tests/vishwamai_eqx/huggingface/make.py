"""Remake `ids.json`: what Hugging Face's tokenizer makes of texts in many languages. Needs transformers.

Run from the repository's root: `python tests/vishwamai_eqx/huggingface/make.py`.
"""

import json
import tempfile
from pathlib import Path

from vishwamai_eqx.tokenizer import VishwamAITokenizer

HERE = Path(__file__).parent

# Article 1 of the Universal Declaration of Human Rights.
LANGUAGES = {
    "english": "All human beings are born free and equal in dignity and rights. They are endowed with reason "
    "and conscience and should act towards one another in a spirit of brotherhood.",
    "french": "Tous les êtres humains naissent libres et égaux en dignité et en droits. Ils sont doués de "
    "raison et de conscience et doivent agir les uns envers les autres dans un esprit de fraternité.",
    "german": "Alle Menschen sind frei und gleich an Würde und Rechten geboren. Sie sind mit Vernunft und "
    "Gewissen begabt und sollen einander im Geist der Brüderlichkeit begegnen.",
    "spanish": "Todos los seres humanos nacen libres e iguales en dignidad y derechos y, dotados como están de "
    "razón y conciencia, deben comportarse fraternalmente los unos con los otros.",
    "portuguese": "Todos os seres humanos nascem livres e iguais em dignidade e em direitos. Dotados de razão e de "
    "consciência, devem agir uns para com os outros em espírito de fraternidade.",
    "italian": "Tutti gli esseri umani nascono liberi ed eguali in dignità e diritti. Essi sono dotati di "
    "ragione e di coscienza e devono agire gli uni verso gli altri in spirito di fratellanza.",
    "dutch": "Alle mensen worden vrij en gelijk in waardigheid en rechten geboren. Zij zijn begiftigd met "
    "verstand en geweten, en behoren zich jegens elkander in een geest van broederschap te gedragen.",
    "polish": "Wszyscy ludzie rodzą się wolni i równi pod względem swej godności i swych praw. Są oni "
    "obdarzeni rozumem i sumieniem i powinni postępować wobec innych w duchu braterstwa.",
    "turkish": "Bütün insanlar hür, haysiyet ve haklar bakımından eşit doğarlar. Akıl ve vicdana sahiptirler ve "
    "birbirlerine karşı kardeşlik zihniyeti ile hareket etmelidirler.",
    "vietnamese": "Tất cả mọi người sinh ra đều được tự do và bình đẳng về nhân phẩm và quyền lợi.",
    "finnish": "Kaikki ihmiset syntyvät vapaina ja tasavertaisina arvoltaan ja oikeuksiltaan.",
    "swahili": "Watu wote wamezaliwa huru, hadhi na haki zao ni sawa. Wote wamejaliwa akili na dhamiri.",
    "russian": "Все люди рождаются свободными и равными в своем достоинстве и правах. Они наделены разумом и "
    "совестью и должны поступать в отношении друг друга в духе братства.",
    "ukrainian": "Всі люди народжуються вільними і рівними у своїй гідності та правах.",
    "greek": "Όλοι οι άνθρωποι γεννιούνται ελεύθεροι και ίσοι στην αξιοπρέπεια και τα δικαιώματα.",
    "arabic": "يولد جميع الناس أحرارًا متساوين في الكرامة والحقوق.",
    "hebrew": "כל בני האדם נולדו בני חורין ושווים בערכם ובזכויותיהם.",
    "persian": "تمام افراد بشر آزاد به دنیا می‌آیند و از لحاظ حیثیت و حقوق با هم برابرند.",
    "hindi": "सभी मनुष्यों को गौरव और अधिकारों के मामले में जन्मजात स्वतन्त्रता और समानता प्राप्त है।",
    "bengali": "সমস্ত মানুষ স্বাধীনভাবে সমান মর্যাদা এবং অধিকার নিয়ে জন্মগ্রহণ করে।",
    "tamil": "மனிதப் பிறவியினர் சகலரும் சுதந்திரமாகவே பிறக்கின்றனர்.",
    "thai": "มนุษย์ทั้งหลายเกิดมามีอิสระและเสมอภาคกันในเกียรติศักดิ์และสิทธิ",
    "chinese": "人人生而自由，在尊严和权利上一律平等。他们赋有理性和良心，并应以兄弟关系的精神相对待。",
    "japanese": "すべての人間は、生まれながらにして自由であり、かつ、尊厳と権利とについて平等である。",
    "korean": "모든 인간은 태어날 때부터 자유로우며 그 존엄과 권리에 있어 동등하다.",
}
AWKWARD = {
    "emoji": "😀👩‍👩‍👧‍👦🏳️‍🌈 ☕️🇮🇳 \U0001f9d1\U0001f3fd\u200d\U0001f680",
    "control": "\x00\x01\x02\x1b[0m\x7f\x85\u200b\u200f\u2028\ufeff",
    "spaces": " leading,  two,   three,     five and trailing   ",
    "only spaces": "       ",
    "tabs and lines": "\t\tif x:\r\n\n\n\treturn  \n",
    "special pieces": "[BOS] [EOS][PAD] [UNK] <s> </s> <unk> <0x0A> <|endoftext|>",
    "digits": "3.14159 1,000,000 0x5EED 2026-11-22",
    "code": "def f(x: int) -> list[str]:\n    return [str(i) for i in range(x) if i % 2 == 0]  # even\n",
    "combining": "e\u0301 a\u0308 ﬁ Ǆ \u1e9b\u0323 한 ｆｕｌｌ",
    "outside": "\U00010348 \U0001d11e \U0010ffff \ue000",
    "empty": "",
}


def main() -> None:
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory() as folder:
        VishwamAITokenizer.train(list(LANGUAGES.values()), 1400, folder)
        (HERE / "tokenizer.model").write_bytes(Path(folder, "tokenizer.model").read_bytes())
        theirs = AutoTokenizer.from_pretrained(folder)
        texts = LANGUAGES | AWKWARD
        ids = theirs(list(texts.values()), add_special_tokens=False)["input_ids"]
    found = {name: {"text": texts[name], "ids": each} for name, each in zip(texts, ids, strict=True)}
    lines = (f"{json.dumps(name)}: {json.dumps(each, ensure_ascii=False)}" for name, each in found.items())
    (HERE / "ids.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
