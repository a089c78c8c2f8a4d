"""Whether a message asks for a person.

A clause does when it wants contact with a person, in one of many languages, and does not deny it. Only a message that
asks for nothing else is answered by the proposal; beside another question the proposal stands behind the answer.
"""

from __future__ import annotations

import re
from typing import Literal

from services.gateway.tools.reading import fold

_READ = 2000
_ONLY = 160
"""A longer message says more than that."""
_MOST_BEYOND = 1
"""Words behind the wish with which it is still all that is said."""
_WORD = re.compile(
    r"\b(?!(?:please|now|today|asap|directly|instead|right|away|immediately|being|thanks?|you|bitte|danke|jetzt|s|il|vous|te"
    r"|plait|merci|por|favor|gracias|per|favore|grazie|alstublieft|alsjeblieft|obrigad[oa]|prosze|prosim|tack|lutfen"
    r"|пожалуйста|싶\w*|주세요|주십시오)\b)\w+"
)

# By language: how contact with a person is wished for. `_P` stands for the person.
_PERSON = (
    r"(?:(?:an?|the|some|any|your|one of your|real|live|actual|human|support|customer|service|sales|care"
    r"|another)[ -])*"
    r"(?:humans?(?: being)?|persons?|people|agents?|representatives?|reps?|operators?|employees?|staff|advisors?"
    r"|someone|somebody|colleagues?|supervisor|manager|(?:support|service) team|customer (?:service|support|care))"
)
_WISHES = (
    # English
    rf"(?:speak|talk|chat)(?:ing)?(?: (?:directly|now|please))? (?:to|with) {_PERSON}",
    rf"(?:(?:connect|transfer|forward|pass|put|hand|refer)(?: (?:me|us|this|it|the (?:chat|conversation|case)))"
    rf"(?: (?:over|on|through|directly))?) (?:to|with) {_PERSON}",
    r"(?:get|give|find|send|want|need|like)(?: me)?(?: to (?:see|have|reach|contact))? (?:an? |the )?"
    r"(?:(?:real|live|actual|human) )+(?:person|human|agent|being|representative|operator|support)",
    r"(?:get|give) me (?:an? |some)(?:human|person|agent|representative|operator|one|body)\b",
    rf"(?:reach|contact|call) {_PERSON}",
    r"(?:can|could|may|will|would) (?:someone|somebody|a (?:human|person|colleague)) (?:please )?"
    r"(?:call|contact|help|phone|ring|talk to|speak (?:to|with)|get back to) me",
    r"(?:i (?:want|need|prefer)|give me|gimme) (?:an? )?(?:human|agent|representative|operator)(?! error)",
    # German
    r"mit (?:einem|einer|nem|ner|ihrem|eurem) (?:\w+ )?(?:menschen?|mitarbeiter(?:in)?|person|kolleg(?:en|in)"
    r"|berater(?:in)?"
    r"|agenten|ansprechpartner(?:in)?|kundenberater(?:in)?|sachbearbeiter(?:in)?)(?: \w+){0,3}? ?(?:sprech\w*"
    r"|red\w*|telefonier\w*"
    r"|verbind\w*|verbunden|chatt\w*|schreib\w*|$)",
    r"(?:sprech\w*|red\w*|verbind\w*)(?: \w+){0,4} mit (?:einem|einer|jemandem)(?: \w+)?"
    r" ?(?:menschen?|mitarbeiter\w*|person|kolleg\w*|berater\w*)?",
    r"(?:echten|richtigen|menschlichen) (?:menschen|mitarbeiter|ansprechpartner|berater|person)",
    r"jemandem (?:sprechen|reden|verbunden)",
    # French
    r"(?:parler|discuter|echanger|parle|contact|relation|joindre|transfer\w+|passer|mett\w+ en (?:relation|contact))"
    r"(?: \w+)?(?: (?:a|au|avec))?"
    r" (?:quelqu'un|(?:un|une|le|la|votre)?(?: (?:vrai|vraie|autre|veritable))? ?"
    r"(?:humaine?|conseill(?:er|ere)|personne|agent|operateur|employee?|etre humain|responsable|service client))\b",
    # Spanish
    r"(?:hablar|habla|comuni\w+|contactar|conect\w+|transfi\w+|pas(?:ar|e)\w*|pong\w+)(?: \w+)?(?: (?:con|a))"
    r" (?:alguien|(?:un|una|el|la|algun)(?: (?:verdader[oa]|ser))?"
    r" (?:human[oa]|persona|agente|operador\w*|representante|asesor\w*|emplead[oa]|servicio))\b",
    # Italian
    r"(?:parlare|parlo|parlar|contattare|mett\w+ in contatto|passar?\w*|trasfer\w+|collegar?\w*)(?: \w+)?"
    r"(?: (?:con|a|ad)) (?:qualcuno|(?:un[oa]?'?|il|la|l')(?: ?(?:vero|vera|essere))?"
    r" ?(?:uman[oa]|persona|operat(?:ore|rice)|agente|addett[oa]|consulente|servizio))\b",
    # Dutch
    r"(?:een )?(?:medewerker|mens|persoon|iemand|collega|echt persoon)(?: \w+){0,2} (?:spreken|praten|contact)",
    r"(?:spreken|praten|verbind\w*|contact|doorverbind\w*|doorverbonden)(?: \w+){0,3} (?:met|een"
    r"|naar) (?:een )?(?:echte? )?"
    r"(?:mens|medewerker|persoon|iemand|collega)",
    r"met (?:een )?(?:echte? )?(?:mens|medewerker|persoon|iemand|collega)(?: \w+)? (?:spreken|praten|gesproken"
    r"|verbonden)",
    # Portuguese
    r"(?:falar|falo|conversar|contat\w+|transfer\w+|ligar|passar?\w*)(?: \w+)?(?: (?:com|para|a))"
    r" (?:alguem|(?:um|uma|o|a) (?:human[oa]|pessoa|atendente|agente|operador\w*|representante|funcionari[oa]"
    r"|ser humano))\b",
    # Polish, Czech
    r"(?:rozmawiac|porozmawiac|polacz\w*|polaczyc)(?: \w+){0,3} z (?:czlowiekiem|konsultant\w*|pracownik\w*"
    r"|osoba|kims|agentem)",
    r"(?:mluvit|spojit|spojte|hovorit)(?: \w+){0,3} (?:s|se) (?:clovekem|operator\w*|pracovnik\w*|nekym)",
    # Nordic
    r"(?:prata|tala|snakke|tale|snakka|kopp\w*)(?: \w+){0,2} (?:med|til) (?:en |et )?(?:riktig |ekte |rigtig )?"
    r"(?:manniska|person|medarbetare|menneske|medarbejder|agent|nogen|noen|nagon|kundeservice)",
    # Turkish, Russian, Arabic
    r"(?:bir )?(?:insan|temsilci|yetkili|musteri temsilcisi|kisi)(?:yle|ile|la|le|siyle)? (?:ile )?"
    r"(?:gorusmek|konusmak|baglan\w*|gorusebilir)",
    r"(?:поговорить|говорить|связаться|соедин\w*|переключ\w*|свяж\w*|позов\w*)(?: \w+){0,3} (?:с )?"
    r"(?:человек\w*|оператор\w*|сотрудник\w*|менеджер\w*|консультант\w*|живым)",
    r"(?:التحدث|اتحدث|التكلم|اتكلم|تحويلي)(?: \w+){0,2} (?:مع|الى) (?:شخص|موظف|انسان|ممثل)",
    # Chinese, Japanese, Korean
    r"(?:转|轉|接|找|要|联系|聯繫|连接)(?:接|到|至|一下)?(?:人工|真人)|人工(?:客服|服务|服務)|(?:跟|和|与"
    r"|與)(?:真人|人工|客服|人)(?:说话|說話|通话|聊|交谈|谈)",
    r"(?:人間|担当者|オペレーター|オペレータ|スタッフ|人|係)(?:の方|の者)?(?:と|に)(?:直接)?(?:話|お話|つない"
    r"|繋い|代わ|替わ|連絡|相談)",
    r"(?:상담원|상담사|사람|직원|담당자)(?:과|와|이랑|하고|에게|한테|을|를|으로)? ?(?:직접 )?(?:통화|대화|연결"
    r"|이야기|얘기|말하|바꿔)",
)
_BARE = (
    r"(?:please )?(?:an? )?(?:real |live )?(?:human(?: being)?|agent|real person|live person|operator|representative"
    r"|customer (?:service|support))(?: please)?",
    r"(?:bitte )?(?:ein(?:en)? )?(?:echten? )?(?:mensch(?:en)?|mitarbeiter(?:in)?)(?: bitte)?",
    r"(?:un )?(?:humain|conseiller)(?: s'il (?:vous|te) plait)?|(?:un )?(?:agente|humano)(?: por favor)?",
    r"(?:un )?operatore(?: per favore)?|(?:een )?mens(?: alstublieft)?|(?:um )?atendente(?: por favor)?",
    r"人工|真人|人工客服|オペレーター|상담원",
)
_DENIED = re.compile(
    fold(
        r"(?<![a-zа-я])(?:not|no|never|without|dont|don'?t|doesn'?t|didn'?t|can'?t be bothered|won'?t|needn'?t"
        r"|instead of"
        r"|rather than|hate|avoid|tired of|already|yesterday|last (?:week|time|month)|talked|spoke|spoken|chatted"
        r"|told|said"
        r"|was (?:talking|speaking)|before i|nicht|kein\w*|ohne|statt|anstatt|niemand|bereits|schon|gestern"
        r"|habe? .* gesprochen"
        r"|ne|n'ai|pas|sans|deja|hier|jamais|au lieu|sin|nunca|ya|ayer|en vez|tampoco|non|senza|gia|ieri|invece"
        r"|niet|geen|zonder|al|gisteren|nao|sem|ja|ontem|nie|bez|juz|wczoraj|nechci|ikke|inte|utan|uden"
        r"|istemiyorum|не|без|уже|вчера|لا|لست)(?![a-zа-я])"
        r"|不想|不要|不用|不需要|无需|無需|别|昨天|たくない|なくて|(?<!つ)ないで|不要です|昨日|필요 ?없"
        r"|싶지 ?않|말고|어제"
    )
)
_OTHERS = re.compile(
    r"\b(?:my|our|his|her|their) (?:\w+ )?(?:colleague|manager|agent|supervisor|representative|team|staff)"
)
_CLAUSE = re.compile(
    r"[.!?;:\n,。！？；，、]+|(?<![a-z])(?:but|sondern|aber|mais|pero|sino|ma|maar|mas|ale|och|но"
    r"|а)(?![a-zа-я])|\s[-–—]\s"
)
_WISH = re.compile(fold("|".join(f"(?:{wish})" for wish in _WISHES)))
_ALONE = re.compile(fold("|".join(_BARE)))


def wants_person(text: str) -> Literal["no", "also", "only"]:
    """`only`: the message asks for a person and nothing else; `also`: among other things."""
    clauses = [" ".join(clause.split()) for clause in _CLAUSE.split(fold(text[-_READ:]).replace("’", "'"))]
    rests = [rest for clause in clauses if (rest := _beyond_the_wish(clause)) is not None]
    if not rests:
        return "no"
    alone = len(text) <= _ONLY and not re.search(r"\d", text) and "?" not in text[:-1]
    # 'I need a representative' may go on with 'sample of the fabric'.
    return "only" if alone and all(len(_WORD.findall(rest)) <= _MOST_BEYOND for rest in rests) else "also"


def _beyond_the_wish(clause: str) -> str | None:
    """What a clause says behind its wish for a person; None where it has none."""
    if _ALONE.fullmatch(clause):
        return ""
    wish = _WISH.search(clause)
    return clause[wish.end() :] if wish and not _DENIED.search(clause) and not _OTHERS.search(clause) else None
