"""Real text in sixteen scripts or languages: how the Universal Declaration of Human Rights begins.

The first article of each translation; the English one is followed by the preamble's first sentence.
"""

from __future__ import annotations

ARTICLES = {
    "English": "All human beings are born free and equal in dignity and rights. They are endowed "
    "with reason and conscience and should act towards one another in a spirit of brotherhood.\n"
    "Whereas recognition of the inherent dignity and of the equal and inalienable rights of all "
    "members of the human family is the foundation of freedom, justice and peace in the world,",
    "German": "Alle Menschen sind frei und gleich an Würde und Rechten geboren. Sie sind mit "
    "Vernunft und Gewissen begabt und sollen einander im Geist der Brüderlichkeit begegnen.",
    "Vietnamese": "Tất cả mọi người sinh ra đều được tự do và bình đẳng về nhân phẩm và quyền lợi. "
    "Mọi con người đều được tạo hoá ban cho lý trí và lương tâm và cần phải đối xử với nhau trong "
    "tình anh em.",
    "Russian": "Все люди рождаются свободными и равными в своем достоинстве и правах. Они наделены "
    "разумом и совестью и должны поступать в отношении друг друга в духе братства.",
    "Greek": "Όλοι οι άνθρωποι γεννιούνται ελεύθεροι και ίσοι στην αξιοπρέπεια και τα δικαιώματα. "
    "Είναι προικισμένοι με λογική και συνείδηση, και οφείλουν να συμπεριφέρονται μεταξύ τους με "
    "πνεύμα αδελφοσύνης.",
    "Arabic": "يولد جميع الناس أحرارًا متساوين في الكرامة والحقوق. وقد وهبوا عقلاً وضميرًا وعليهم "
    "أن يعامل بعضهم بعضًا بروح الإخاء.",
    "Hebrew": "כל בני האדם נולדו בני חורין ושווים בערכם ובזכויותיהם. כולם חוננו בתבונה ובמצפון, "
    "לפיכך חובה עליהם לנהוג איש ברעהו ברוח של אחוה.",
    "Hindi": "सभी मनुष्यों को गौरव और अधिकारों के मामले में जन्मजात स्वतन्त्रता और समानता प्राप्त है। "
    "उन्हें बुद्धि और अन्तरात्मा की देन प्राप्त है और परस्पर उन्हें भाईचारे के भाव से बर्ताव करना चाहिए।",
    "Bengali": "সমস্ত মানুষ স্বাধীনভাবে সমান মর্যাদা এবং অধিকার নিয়ে জন্মগ্রহণ করে। তাঁদের বিবেক এবং "
    "বুদ্ধি আছে; সুতরাং সকলেরই একে অপরের প্রতি ভ্রাতৃত্বসুলভ মনোভাব নিয়ে আচরণ করা উচিত।",
    "Tamil": "மனிதப் பிறிவியினர் சகலரும் சுதந்திரமாகவே பிறக்கின்றனர்; அவர்கள் மதிப்பிலும், "
    "உரிமைகளிலும் சமமானவர்கள்.",
    "Thai": "มนุษย์ทั้งหลายเกิดมามีอิสระและเสมอภาคกันในเกียรติศักดิ์และสิทธิ "
    "ต่างมีเหตุผลและมโนธรรม และควรปฏิบัติต่อกันด้วยเจตนารมณ์แห่งภราดรภาพ",
    "Chinese": "人人生而自由，在尊严和权利上一律平等。"
    "他们赋有理性和良心，并应以兄弟关系的精神相对待。",
    "Japanese": "すべての人間は、生まれながらにして自由であり、かつ、"
    "尊厳と権利とについて平等である。"
    "人間は、理性と良心とを授けられており、互いに同胞の精神をもって行動しなければならない。",
    "Korean": "모든 인간은 태어날 때부터 자유로우며 그 존엄과 권리에 있어 동등하다. "
    "인간은 천부적으로 "
    "이성과 양심을 부여받았으며 서로 형제애의 정신으로 행동하여야 한다.",
    "Georgian": "ყველა ადამიანი იბადება თავისუფალი და თანასწორი თავისი ღირსებითა და უფლებებით. "
    "მათ მინიჭებული აქვთ გონება და სინდისი და ერთმანეთის მიმართ "
    "უნდა იქცეოდნენ ძმობის სულისკვეთებით.",
    "Armenian": "Բոլոր մարդիկ ծնվում են ազատ ու հավասար իրենց արժանապատվությամբ ու իրավունքներով։ "
    "Նրանք ունեն բանականություն ու խիղճ և միմյանց պետք է եղբայրաբար վերաբերվեն։",
}

# What a splitter could get wrong: runs of spaces and line breaks, white space that is not ASCII,
# apostrophes, digits, scripts without a space between, marks apart from their letters, characters
# that a normalizer takes for a space or removes, emoji of several characters, the signs that stand
# for a space, and the names of special tokens.
ODD = [
    *" \n\t\r\x0b\x0c\x1c\x85\xa0\u1680\u2003\u2028\u3000\u200b\u200d\ufeff\xad\x00\x7f\u0600",
    *["  ", "   ", "    ", "\n\n", " \n", "\n ", "\r\n", "\t\t"],
    *[
        "'s",
        "'",
        "’t",
        "don't",
        "I'LL",
        "'re",
        '"',
        "...",
        ".",
        ",",
        "!?",
        "-",
        "--",
        "(",
        ")",
        "/",
    ],
    *["1", "12", "123456", "3.14", "1,000", "٣٤", "½", "²", "a1b2"],
    *["a", "A", "the", " the", "The cat", "é", "e\u0301", "\u0301", " \u0301", "ß", "İ", "ﬁ", "Å"],
    *[
        "中文",
        "中",
        "かな",
        "ｱ",
        "한글",
        "ไทย",
        "हिन्दी",
        "קד",
        "عربي",
        "Ж",
        "ẞ",
        "\u0d4e",
        "ﱞ",
        "\xa8",
    ],
    *[
        "😀",
        "👩\u200d👩\u200d👧",
        "🇩🇪",
        "❤️",
        "▁",
        "▁a",
        "Ġ",
        "Ġa",
        "_",
        "##a",
        "<",
        ">",
        "|||",
        "[",
        "]",
    ],
    *["<s>", "</s>", "<pad>", "<unk>", "<bos>", "[CLS]", "[SEP]", "[UNK]", "<|endoftext|>"],
    *["<e1>", "<x y>", "|||EMAIL|||", "[NAME]", "<e1", "x y"],
]
