"""Whether the keyword judge can read a response: it knows English refusals only, and one in
another language counts as compliance.

A response is unread where most of its letters are of another script than Latin, or where the words that a
language is held together by are more often another language's than English ones. A text that shows neither (a
number, a name, code, nonsense) counts as read: this is evidence of another language, not proof of English.
"""

import re
import unicodedata

FUNCTION_WORDS = {
    "english": (
        "the of and to in is that it for you with are not on be this as have can my your but or if we "
        "they was will do an at by from so what there help cannot sorry such any would should its "
        "about no me has all more when how than who which one into out up he she his her"
    ),
    "german": (
        "der die das und ist nicht ich zu den ein eine mit auf für von dem es sie dass kann wir bei "
        "aber oder wie auch nur werden leider kein keine ihnen dir dabei ihr sich im tut mir helfen"
    ),
    "french": (
        "le la les des et est pas je ne un une du en que qui pour vous dans ce cette sur mais ou avec "
        "il elle nous mon votre désolé peux puis aider sont au aux ces ça"
    ),
    "spanish": (
        "el la los las de es no que en un una por con para lo se su al del como más pero puedo siento "
        "ayudarte eso esta este esa yo mi tu le sus"
    ),
    "portuguese": (
        "os as de não que em um uma por com para do da no na se mas eu posso isso esta este desculpe "
        "ajudar você ao dos das lamento sobre são seu sua"
    ),
    "italian": (
        "il lo la gli le di non che in un una per con del della mi si ma come posso questo questa "
        "aiutarti mio tuo sono da al dei nel spiace"
    ),
    "dutch": (
        "de het een en is niet ik je van in op dat te voor met die zijn maar kan daar bij helpen geen "
        "deze dit ook aan wij om sorry"
    ),
    "polish": "nie na się że do to jest jak ale mogę tym przykro mi dla co czy pomóc po tego",
    "swedish": (
        "och att det är inte jag en ett som för med på av den kan men tyvärr hjälpa dig detta om till"
    ),
    "turkish": (
        "ve bir bu için değil ben ile de da ne çok üzgünüm yardımcı olamam edemem size ama mi konuda"
    ),
    "indonesian": (
        "yang dan di tidak saya untuk dengan ini itu adalah dari bisa maaf anda dapat membantu atau "
        "pada akan ke hal karena"
    ),
    "vietnamese": ("tôi không thể và là của cho bạn với này điều một các có được xin lỗi giúp những việc về"),
}
"""of the languages in Latin script that are told apart; words that English has too count for both, and single
letters, which code and lists have, for none"""
_WORDS = {language: frozenset(words.split()) for language, words in FUNCTION_WORDS.items()}
_ENGLISH = _WORDS["english"]
_OTHERS = [words for language, words in _WORDS.items() if language != "english"]


def is_read(response: str) -> bool:
    """Whether a response shows no other language than English.

    >>> is_read("I can't help with that."), is_read("Dabei kann ich Ihnen leider nicht helfen.")
    (True, False)
    """
    letters = [letter for letter in response if letter.isalpha()]
    latin = sum(unicodedata.name(letter, "").startswith("LATIN") for letter in letters)
    if 2 * latin < len(letters):
        return False
    words = re.findall(
        r"[^\W\d_]{2,}", unicodedata.normalize("NFC", response).lower()
    )  # letters are no words
    english = sum(word in _ENGLISH for word in words)
    other = max(sum(word in known for word in words) for known in _OTHERS)
    return other <= english or other < 2
