"""Texts on which two tokenizers are compared: more than twenty scripts, digits, code, spaces."""

from __future__ import annotations

SCRIPTS = {
    "Latin": "The quick brown fox jumps over the lazy dog; doesn't it? WE'LL see, he'd said.",
    "Latin, accented": "À la carte: naïve façade, straße, Łódź, čeština, kỳ lạ, İstanbul, ﬁn.",
    "Cyrillic": "Съешь ещё этих мягких французских булок, да выпей чаю. Їжак.",
    "Greek": "Γαζέες καὶ μυρτιὲς δὲν θὰ βρῶ πιὰ στὸ χρυσαφὶ ξέφωτο.",
    "Armenian": "Բարեւ աշխարհ, ինչպե՞ս ես այսօր։",
    "Georgian": "გამარჯობა, როგორ ხარ დღეს?",
    "Hebrew": "שלום עולם, דג סקרן שט בים.",
    "Arabic": "مرحبا بالعالم، صِف خَلقَ خَودٍ كَمِثلِ الشَمسِ ٣٤٥.",
    "Devanagari": "नमस्ते दुनिया, आप कैसे हैं? १२३",
    "Bengali": "ওহে বিশ্ব, তুমি কেমন আছো? ৪৫",
    "Gurmukhi": "ਸਤ ਸ੍ਰੀ ਅਕਾਲ ਦੁਨੀਆ",
    "Gujarati": "નમસ્તે દુનિયા, કેમ છો?",
    "Tamil": "வணக்கம் உலகம், எப்படி இருக்கிறீர்கள்?",
    "Telugu": "నమస్కారం ప్రపంచం",
    "Sinhala": "ආයුබෝවන් ලෝකය",
    "Thai": "สวัสดีชาวโลก วันนี้เป็นอย่างไรบ้าง ๑๒๓",
    "Lao": "ສະບາຍດີຊາວໂລກ",
    "Tibetan": "བཀྲ་ཤིས་བདེ་ལེགས།",
    "Burmese": "မင်္ဂလာပါ ကမ္ဘာလောက",
    "Khmer": "សួស្តីពិភពលោក",
    "Ethiopic": "ሰላም ዓለም፣ እንዴት ነህ?",
    "Han": "你好，世界。今天天气怎么样？漢字與繁體。",
    "Kana": "いろはにほへと チリヌルヲ、こんにちは世界！",
    "Hangul": "안녕하세요 세계, 다람쥐 헌 쳇바퀴에 타고파.",
    "Mongolian": "ᠰᠠᠶᠢᠨ ᠪᠠᠶᠢᠨ᠎ᠠ ᠤᠤ",
}
OTHERS = (
    "0 1 12 123 1234 12345 1234567890 3.14159 1e-7 67,890.12 2026-11-22 ½ ² Ⅷ",
    'def f(x: int) -> str:\n    return f"{x!r}"  # <tag attr=\'1\'/> {"key": [null, -0.5]}\r\n',
    "for (int i = 0; i < n; ++i) {\n\t\tsum += a[i] * b[i];\n\t}\n\n\n#include <x>\n",
    "a  b   c    d     e\n\n f\t\tg \n \n  h   \n",
    "   three spaces before, two behind  ",
    "CamelCaseWords snake_case_words kebab-case http://example.org/path?q=1&r=%20 me@example.org",
    "!!! ... ??? --- *** ### $$$ @@@ &&& ((( ))) [[[ ]]] {{{ }}} ||| ~~~ ``` \\\\\\ ///",
    "😀 👨‍👩‍👧 🇩🇪 ∑∫√≠ ±½ → ⇒ «quoted» „so“ ‘so’ “so” – — …",
    "cafe\u0301 e\u0301\u0323 A\u030a \u1112\u1161\u11ab",
    "zero\u200bwidth \ufeffbom \u00a0no-break \u3000ideographic \u2028line",
    "I'm you're he's we've they'll I'd 'tis O'Neil ROCK'N'ROLL it’s",
)
TEXTS = (*SCRIPTS.values(), *OTHERS)
