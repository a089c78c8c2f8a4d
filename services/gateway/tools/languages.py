"""Words of business in many languages: data for `reading`, `claims` and `hand_over`, nothing else.

Every entry is a pair of alternatives for regular expressions on folded text (lower case, no accents): first of
languages that set words apart (English, German, French, Spanish, Italian, Dutch, Portuguese, Polish, Czech, the Nordic
ones, Turkish, Romanian, Hungarian, Vietnamese, Indonesian, Russian, Ukrainian, Greek, Arabic), then Chinese, Japanese,
Korean.
"""

from __future__ import annotations

from services.gateway.systems.base import Kind

Words = tuple[str, str]

KINDS: dict[Kind, Words] = {
    "order": (
        r"order(?:s|no|nr|number|id)?|purchases?|bestell\w*|auftr[aä]\w*|command\w*|achats?|pedidos?|compras?"
        r"|ordin[ei]"
        r"|orden(?:es)?|encomendas?|zam[oó]wieni\w*|objedn[aá]v\w*|best[aä]llning\w*|bestilling\w*|ordren?"
        r"|tilau\w*|sipari[sş]\w*"
        r"|comand\w*|rendel[eé]s\w*|đơn hàng|pesanan|заказ\w*|замовлен\w*|παραγγελί\w*|(?:ال)?طلب\w*",
        r"订单|訂單|单号|單號|注文|オーダー|주문",
    ),
    "delivery": (
        r"deliver\w*|shipments?|shipping|parcels?|packages?|liefer\w*|sendung\w*|paket\w*|livraison\w*|colis"
        r"|env[ií]os?"
        r"|entregas?|paquetes?|consegn\w*|spedizion\w*|levering\w*|zending\w*|pakket\w*|dostaw\w*|przesyłk\w*"
        r"|paczk\w*"
        r"|dodáv\w*|zásilk\w*|leverans\w*|teslimat\w*|kargo\w*|livrar\w*|доставк\w*|посылк\w*|(?:ال)?شحن\w*|توصيل\w*",
        r"发货|發貨|配送|快递|快遞|包裹|送货|送貨|配達|出荷|荷物|発送|배송|배달|택배",
    ),
    "invoice": (
        r"invoices?|bills?|rechnung\w*|factur\w*|fattur\w*|fatura\w*|faktur\w*|lasku\w*|számla\w*|hóa đơn|счет\w*"
        r"|рахун\w*|τιμολόγι\w*|(?:ال)?فاتور\w*",
        r"发票|發票|账单|賬單|帳單|請求書|インボイス|송장|청구서",
    ),
    "stock": (
        r"stock|in stock|available|availability|inventory|lager\w*|verf[uü]gbar\w*|vorr[aä]tig\w*|disponib\w*"
        r"|existencias|magazzino|voorraad\w*|estoque|magazyn\w*|dostępn\w*|skladem|stok\w*|наличи\w*|складе|متوفر\w*",
        r"库存|庫存|有货|有貨|现货|現貨|在庫|재고",
    ),
    "customer": (
        r"my (?:account|data|address|details)|mein\w* (?:konto|daten|adresse)|mon compte|mi cuenta|mio conto"
        r"|mijn (?:account|gegevens)|minha conta|moje (?:konto|dane)|мои данные",
        r"我的账户|我的帳戶|我的资料|我的資料|私の情報|アカウント情報|내 정보",
    ),
}
MARKERS = frozenset(
    ["no", "nr", "n", "num", "nro", "numero", "number", "nummer", "numer", "id", "ref", "nos", "nummern", "numbers"]
)
"""What stands before a number and says that it is one."""

FACTS: Words = (
    r"(?:un)?paid|shipped|sent|delivered|process(?:ing|ed)|cancel+ed|blocked|confirmed|overdue|due|on (?:its|the) way"
    r"|in transit|arriv(?:es?|ed|ing)|dispatched|in stock|sold out|available|totals?|amounts?|costs?|refunded|pending"
    r"|completed|scheduled|(?:units?|pieces?) left|posted|invoiced|picked up|out for delivery"
    r"|(?:un)?bezahlt|versandt|versendet|verschickt|(?:aus)?geliefert|zugestellt|in bearbeitung|storniert|bestätigt"
    r"|offen|fällig|unterwegs|auf lager|verfügbar|vorrätig|ausverkauft|beträgt|(?:gesamt)?(?:summe|betrag)|angekommen"
    r"|kostet|gesendet"
    r"|pay[eé]e?s?|exp[eé]di[eé]e?s?|livr[eé]e?s?|envoy[eé]e?s?|en cours|annul[eé]e?s?|confirm[eé]e?s?|en route"
    r"|en stock|disponibles?|montant|co[uû]te"
    r"|pagad[oa]s?|enviad[oa]s?|entregad[oa]s?|en camino|en proceso|procesad[oa]s?|cancelad[oa]s?|confirmad[oa]s?"
    r"|pendientes?|importe|agotad[oa]s?|en existencia"
    r"|pagat[oaie]|spedit[oaie]|consegnat[oaie]|inviat[oaie]|in corso|annullat[oaie]|confermat[oaie]|in arrivo"
    r"|disponibil[ei]|importo|totale|esaurit[oaie]"
    r"|betaald|verzonden|verstuurd|geleverd|bezorgd|onderweg|geannuleerd|bevestigd|op voorraad|beschikbaar|bedrag"
    r"|totaal|in behandeling|uitverkocht"
    r"|pag[oa]s?|enviad[oa]s?|entregues?|a caminho|processad[oa]s?|dispon[ií]ve(?:l|is)|valor|esgotad[oa]s?"
    r"|(?:o|za)płacon\w*|wysłan\w*|dostarczon\w*|anulowan\w*|w drodze|w realizacji|dostępn\w*|kwota|łącznie"
    r"|zaplacen\w*|odeslán\w*|doručen\w*|betald\w*|betalt|skicka\w*|levererad\w*|levert|sendt"
    r"|ödendi|gönderildi|teslim edildi|yolda|iptal edildi|stokta|tutarı?|toplam"
    r"|оплачен\w*|отправлен\w*|доставлен\w*|в пути|отменен\w*|обрабатыва\w*|в наличии|сумма"
    r"|مدفوع\w*|تم (?:دفع|شحن|توصيل|إلغاء)\w*|متوفر\w*",
    r"已付款|已支付|未付款|已发货|已發貨|已送达|已送達|运输中|運輸中|处理中|處理中|已取消|有货|有貨|缺货|缺貨"
    r"|总额|總額|金额|金額"
    r"|支払済|支払い済|支払われ|発送済|発送しま|発送され|届きま|処理中|キャンセルされ|在庫があり|在庫あり|合計|金額"
    r"|결제되|결제 완료|배송 중|배송되|발송되|취소되|재고가 있|합계|금액|처리 중",
)
"""What is said of a record as a fact."""

STATES: Words = (
    r"is|was|are|were|has|have|had|will|ist|war|wurden?|wird|werden|hat|sind|est|sont|sera|etait|esta|estan|fue|sera"
    r"|ha|han|e|sono|sara|werd|wordt|zal|heeft|foi|foram|esta|jest|sa|zostal\w*|bude|byl\w*|blev|ar|er|был\w*|будет",
    r"は|が|是|已|了|입니다|니다",
)
"""Verbs that make a sentence about a named record a statement."""

UNKNOWN: Words = (
    r"not (?:found|find|logged in|able|sure)|no (?:such )?(?:records?|orders?|invoices?|deliver\w*|information"
    r"|data|access)"
    r"|can(?:no|[’' ]?)t|can not|could(?: not|n[’']?t)|unable|(?:do|does|did)(?: not|n[’']?t) (?:have|know|see"
    r"|find|exist)"
    r"|unknown|please|(?:should|would|could|might|may) |if|once|whether|unless|as soon as|when you\w*|usually"
    r"|typically"
    r"|normally|generally"
    r"|nicht (?:gefunden|finden|angemeldet|sagen|vor)|keine? (?:bestell|rechnung|liefer|datens|daten"
    r"|information|auftr|zugriff)\w*"
    r"|(?:kann|konnte|können)(?: \w+){0,3} (?:nicht|kein\w*)|bitte|wenn|falls|ob|sobald|normalerweise"
    r"|weiß (?:ich )?nicht"
    r"|introuvables?|pas (?:trouv\w*|acc[eè]s|d[’']\w+)|aucun\w*|ne (?:peux|peut|trouve|dispose|connais"
    r"|sais)\w*|veuillez"
    r"|si|lorsque|d[eè]s que|n[’']ai pas|g[eé]n[eé]ralement"
    r"|no (?:encuentr\w*|encontr\w*|se (?:ha )?encontr\w*|pued\w*|pude|tengo|dispongo|hay|existe|s[eé])|ning[uú]n\w*"
    r"|cuando|una vez|por favor|normalmente"
    r"|non (?:trov\w*|ho|posso|[eè] stat\w* trovat\w*|risulta|riesco|so)|nessun\w*|se|quando|per favore|di solito"
    r"|niet (?:gevonden|vinden)|geen (?:bestelling|factuur|gegevens|informatie|record)\w*"
    r"|kan (?:ik )?(?:\w+ )?(?:niet|geen)"
    r"|als|zodra|wanneer|alstublieft"
    r"|n[aã]o (?:encontr\w*|foi encontrad\w*|tenho|posso|consegu\w*|h[aá]|sei)|nenhum\w*|uma vez"
    r"|nie (?:znal\w*|mog\w*|mam|wiem|ma)|brak|je[sś]li|gdy|prosz[eę]"
    r"|bulunamad\w*|bulamad\w*|bilmiyor\w*|eğer|lütfen"
    r"|не (?:найд\w*|могу|наш\w*|удалось|знаю)|нет (?:данных|информации|такого)|если|когда|пожалуйста"
    r"|لم (?:أجد|يتم العثور)|لا (?:أستطيع|يمكنني|يوجد)|إذا|يرجى",
    r"找不到|未找到|没有找到|沒有找到|查不到|无法|無法|不知道|没有|沒有|如果|请|請"
    r"|見つかりません|見つけられ|できません|わかりません|分かりません|ありません|場合|もし|ください"
    r"|찾을 수 없|없습니다|모르|만약|경우|주세요",
)
"""What makes a sentence say that nothing is known, or speak of no case in particular."""
