"""Who wants a person, and who only speaks of one."""

from __future__ import annotations

import pytest

from services.gateway.tools.hand_over import wants_person

ONLY = [
    "gimme a human, thank you",
    "I want to speak to a human being, please",
    "I want to talk to a human",
    "I'd like to speak with a representative",
    "can I talk to someone?",
    "Please connect me to an agent",
    "Transfer me to a real person please.",
    "put me through to customer service",
    "Get me a human!",
    "human please",
    "agent",
    "Can someone call me?",
    "This is useless, I need a real person",
    "Kann ich mit einem Mitarbeiter sprechen?",
    "Ich möchte mit einem Menschen reden",
    "Verbinden Sie mich bitte mit einem Berater.",
    "Ich will mit jemandem sprechen",
    "Je voudrais parler à un conseiller",
    "Je veux parler à quelqu'un",
    "Puis-je parler à un être humain ?",
    "Mettez-moi en contact avec un agent s'il vous plaît",
    "Quiero hablar con una persona",
    "¿Puedo hablar con un agente?",
    "Necesito hablar con alguien",
    "Vorrei parlare con un operatore",
    "Posso parlare con una persona?",
    "Ik wil graag een medewerker spreken",
    "Kan ik met een mens praten?",
    "Quero falar com um atendente",
    "Gostaria de falar com uma pessoa",
    "Chcę rozmawiać z człowiekiem",
    "Proszę połączyć mnie z konsultantem",
    "Я хочу поговорить с человеком",
    "Соедините меня с оператором",
    "Jag vill prata med en människa",
    "Bir temsilci ile görüşmek istiyorum",
    "أريد التحدث مع موظف",
    "转人工",
    "我要找人工客服",
    "我想跟真人说话",
    "人間と話したいです",
    "オペレーターにつないでください",
    "担当者と話したい",
    "상담원과 통화하고 싶어요",
    "상담원 연결해 주세요",
]
ALSO = [
    "get me a person-sized box",
    "Do I need an agent to import chairs?",
    "I need a representative sample of the fabric",
    "I want to speak to a human about order 2",
    "Where is my order 2? And please connect me to an agent.",
    "Wo ist Bestellung 2? Ich möchte mit einem Mitarbeiter sprechen.",
    "It does not work, connect me to a real person, my order is 17",
    "No, I want to talk to a human, not order 2 again",
]
NO = [
    "What does your agent Smith say about order 2?",
    "Could a person sign for my parcel?",
    "Kann mir jemand sagen, wo Bestellung 2 ist?",
    "¿Alguien puede decirme dónde está mi pedido 2?",
    "誰か注文2の状況を教えてください",
    "我想买人工智能的书",
    "有人能告诉我订单2的状态吗",
    "담당자 이름이 송장에 있나요",
    "Put me down for two chairs",
    "оператор доставки потерял посылку 3",
    "I do not want to talk to an agent, just tell me about order 2",
    "Please transfer invoice 2 to my colleague",
    "I don't want to speak to a human",
    "I already talked to an agent yesterday and he said order 2 is paid",
    "My agent will pick up the parcel",
    "Please send order 2 to another person",
    "Someone stole my parcel",
    "Can you pass the chair to the next person in line?",
    "I would rather chat with you than with a person, no need to connect me to an agent",
    "Who is the person on the invoice?",
    "How many people work at your company?",
    "No human has answered my mail",
    "Is the agent fee included in invoice 2?",
    "Please hand the parcel to my neighbour",
    "Can I transfer money to someone abroad?",
    "Tell me about the human resources software you sell",
    "I spoke to someone last week about delivery 4",
    "The delivery person left the parcel outside",
    "where is my order?",
    "Bitte übertragen Sie die Rechnung 2 auf meinen Kollegen",
    "Ich möchte nicht mit einem Mitarbeiter sprechen, nur wissen, wo Bestellung 2 ist",
    "Ich habe gestern schon mit einem Mitarbeiter gesprochen",
    "Ein Mitarbeiter hat das Paket angenommen",
    "Wie viele Menschen arbeiten bei euch?",
    "Je ne veux pas parler à un conseiller",
    "Pouvez-vous transférer la facture 2 à mon collègue ?",
    "Une personne a signé le colis",
    "J'ai déjà parlé à un conseiller hier",
    "No quiero hablar con un agente, solo dime dónde está mi pedido",
    "Envíe la factura 2 a otra persona",
    "Ya hablé con una persona ayer",
    "Non voglio parlare con un operatore",
    "Trasferisci la fattura 2 al mio collega",
    "Ik wil niet met een medewerker praten",
    "Stuur factuur 2 naar mijn collega",
    "Não quero falar com um atendente",
    "Nie chcę rozmawiać z konsultantem",
    "Я не хочу говорить с оператором",
    "Оператор доставки не приехал",
    "我不想跟人工客服说话",
    "这个人是谁？",
    "人と話したくないです",
    "荷物を他の人に送ってください",
    "상담원과 통화하고 싶지 않아요",
    "",
]


@pytest.mark.parametrize("text", ONLY)
def test_who_wants_a_person(text: str) -> None:
    assert wants_person(text) == "only"


@pytest.mark.parametrize("text", ALSO)
def test_who_wants_a_person_beside_something_else(text: str) -> None:
    assert wants_person(text) == "also"


@pytest.mark.parametrize("text", NO)
def test_who_does_not(text: str) -> None:
    assert wants_person(text) == "no"
