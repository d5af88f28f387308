"""Which findings a report states: a rule-based labeler for English and Chinese, and CheXbert.

The codes are 0 not mentioned, 1 present, 2 absent, 3 uncertain; only 1 counts as present in the scores. A
report is split into sentences and these into clauses. In each clause the words of a finding are looked for,
and for each of them: the organ that it is said of (a thyroid nodule is no lung lesion), whether it is denied,
doubted or only history, and what is said of its change ("no change in the nodule" denies no nodule). Present
overrides uncertain, and uncertain overrides absent.

Two label spaces: the 14 findings of the prompt, and the 18 labels of CT-RATE. A further finding needs its
words in ENGLISH_18 and in CHINESE_18 under one name: then `label_all` reads it. In LABELS_18 too, nlg_eval.py
scores it, and real_reports.py asks for it in the file of labels. NOT_OF holds the organs that it is not
said of, NORMAL the sentences that deny it without its word.
"""

import re
import unicodedata
from functools import lru_cache

from common.errors import UserError
from dia_pangu.src.Dataset.prompt import FINDINGS

BLANK, PRESENT, ABSENT, UNCERTAIN = 0, 1, 2, 3
RANK = {BLANK: 0, ABSENT: 1, UNCERTAIN: 2, PRESENT: 3}  # of two statements the one with the higher rank holds


def both(en: str, cn: str) -> re.Pattern:
    """Return one pattern for both languages, which a sentence may mix; case does not matter."""
    return re.compile(f"(?a:{en})|{cn}", re.I)  # no Chinese character is part of an English word


# Words that name a finding. English patterns match at word starts, Chinese ones anywhere.
ENGLISH = {
    "enlarged cardiomediastinum": r"(?:widen\w*|enlarge\w*|broaden\w*)[^,;]*mediastin(?!\w* (?:lymph|node))|"
    r"(?:cardio)?mediastin\w*(?:(?!lymph|node)[^,;])*(?:widen|enlarge|broaden)(?!\w* lymph)|"
    r"(?:(?<!abdominal )aort\w*|pulmonary (?:arter|trunk|conus))[^,;]*\b(?:dilat|ecta[st]|aneurysm|widen|"
    r"increased|enlarge)|(?:aort|pulmonary)\w*[^;]*wider than (?:normal|usual)|(?:dilat\w*|aneurysm\w*|"
    r"ecta[st]\w*|widen\w*|enlarge\w*)[^,;]*(?:(?<!abdominal )aort|pulmonary (?:arter|trunk))",
    "cardiomegaly": r"cardiomegal|(?:heart|cardiac)[^,;]*\b(?:enlarge|increase|wide|big|broad|dilat|larger|"
    r"prominent)|(?:enlarge\w*|increase\w*|dilat\w*)[^,;]*(?:heart|cardiac|cardiothora|ventric|\batri)|"
    r"(?:left|right|both|all) (?:cardiac chamber|ventric\w*|atri\w*)[^,;]*(?:enlarge|dilat|increase)|"
    r"(?:cardiothoracic|\bCTR\b)[^,;]*(?:increase|enlarge|0[.,](?:5[1-9]|[6-9])|\b(?:5[1-9]|[6-9]\d) ?%)",
    "lung opacity": r"opacit|opacif|(?:patchy|blurr\w*)[^,;]*shadow|ground.?glass(?! (?:density )?nodul)|"
    r"\bGGOs?\b|hazy|haze|infiltrat|airspace disease|crazy.?paving|"
    r"(?<!sequelae )(?<!sequela )(?<!fibrotic )(?<!parenchymal )(?<!linear )density (?:increase|area)|"
    r"increased (?:\w+ )?attenuation|"
    r"(?:increase\w*|patchy)(?![^,;]*(?:sequel|fibro|linear|fat))[^,;]*densit|tree.?in.?bud",
    "lung lesion": r"(?:micro)?nodul(?!arity|ar (?:[\w-]+ ){0,3}?(?:thicken|consolidat|densit|opacit|"
    r"infiltrat))|lesion|\bmass\b(?!-like)|masses|tumou?r|metasta|carcinoma|"
    r"malignan(?!t (?:pleural )?effusion)|cancer|neoplas|\bGGNs?\b|hamartoma|granulomas?\b|tuberculoma|"
    r"carcinoid|aspergilloma|mycetoma|fungus ball|cavitat|(?:walled|lung|pulmonary|lobe|"
    r"air.containing) cavit(?:y|ies)",
    "edema": r"(?:pulmonary |interstitial |alveolar )?(?:edema|oedema)|interlob\w* sept(?:al|"
    r"a)\b[^,;]{0,24}thick|(?:thick|prominen)\w*[^,;]{0,40}interlobular sept",
    "consolidation": r"consol(?:idat|\b)",
    "pneumonia": r"(?:broncho)?pneumoni(?!ti)|infecti|infective|inflammat(?!ory nodul)|covid|PNA\b",
    "atelectasis": r"atelecta|collaps|volume loss|loss of volume",
    "pneumothorax": r"(?:hydro|hemo|haemo)?pneumothora|PTX\b|PNX\b|"
    r"air\b(?! broncho)[^,;]*\b(?:pleural (?:leaves|spaces?|cavit\w*)|hemithora)|"
    r"pleural (?:spaces?|cavit\w*)[^,;]*\bair\b(?! broncho)",
    "pleural effusion": r"effusions?|(?:hydro|hydropneumo|ha?emo|pyo)thora|empyema|(?:pl(?:eural)?\.? ?|"
    r"b/?l )+effn?s?\b|pleural[^,;]*fluid|fluid[^,;]*(?:hemithora|pleura|costophrenic|fissur|thoracic cavit)",
    "pleural other": r"pleura\w*(?: and \w+)?(?:[^,;](?!effusion\b|fluid\b)){0,40}?(?:thick|plaque|calcif|"
    r"scar|adhes)|(?:thick|plaque|calcif)\w*[^,;]*(?<!sub)pleura(?!l effusion)|effusion.thicken",
    "fracture": r"fractur|fxs?\b|(?:compression|wedge|crush) (?:deformit|change)|wedging of|"
    r"(?:vertebra\w*|\b[CTL]\d\d?\b)[^,;]*(?:wedging|wedge.shaped|height loss|loss of height)|"
    r"loss of (?:vertebral|height of)|(?:height loss|loss of height)[^,;]*(?:vertebra|\b[CTL]\d)|"
    r"broken rib|callus|rib break|cortical disruption|(?:non|mal)-?union",
    "support devices": r"catheter|pacemaker|pacing|\bpacers?\b|support (?:device|apparatus)|\btubes?\b|"
    r"\bstent|\bwires?\b|prosthe|\bport\b|\bport-a-cath|cannula|"
    r"(?<!after )(?<!since )(?<!following )drain(?:age|s)?\b(?! (?:vein|lymph|node))|valve replacement|"
    r"(?:artificial|mechanical|metallic) (?:\w+ )?valve|medical material|sternotomy|suture|clips?\b|"
    r"staples?\b|implant|electrode|\bleads?\b(?= (?:tip|of|in|are|is|end|over|proj|course))|\bICD\b|"
    r"defibrillator|metal\w* (?:material|plate|screw)|\bplate and screw|fixation|hardware|tracheostomy|"
    r"pigtail|loop recorder|assist device|cava\w* filter|\bcoils?\b|vertebroplast|kyphoplast|(?:central|"
    r"venous|arterial|IJ|jugular|subclavian|PICC) line|\b(?:ETT|NGT|CVC|PICC|IABP|LVAD|ECMO|TAVI|TAVR)\b",
}
CHINESE = {
    "enlarged cardiomediastinum": r"纵隔(?:影)?[^,;]{0,4}(?:增宽|增大|扩大)|(?:(?<!腹)主动脉|"
    r"肺动脉)[^,;]{0,8}(?:增宽|增粗|扩张|瘤样|动脉瘤|夹层动脉瘤)|(?:(?<!腹)主动脉|肺动脉)瘤",
    "cardiomegaly": r"(?:心(?:脏|影|室|房|腔|胸比)|全心|[左右]心|[左右][室房])[^,;]{0,8}(?:增大|扩大|肥大|"
    r"饱满|扩张|普大|[稍略偏]大)|巨心|心胸比[^,;]{0,6}?(?:0\.(?:5[1-9]|[6-9])|(?:5[1-9]|[6-9]\d)%)",
    "lung opacity": r"GGO|磨玻璃(?!样?(?:密度)?(?:小|微)?结节)|毛玻璃|模糊(?:阴)?影|阴影|密度增高|密度增加|"
    r"片絮|絮状|云雾状|浸润|渗出|高密度影|致密影|斑片(?!状?实变)|片状影|片影|树芽",
    "lung lesion": r"结节(?![样状](?:增厚|实变))|GGN|软组织(?:密度)?(?:团块|肿块)?影|类圆形[^,;]{0,6}影|"
    r"错构瘤|结核[球瘤]|肉芽肿|曲[菌霉]球|类癌|(?<![乳状列胰胸腮涎])腺癌|鳞癌|小细胞癌|肿块(?!样)|肿物|病灶|"
    r"占位|空洞|转移瘤|转移灶|转移|肿瘤|[肺叶]癌|包块|团块",
    "edema": r"水肿|小叶间隔[^,;]{0,4}增厚",
    "consolidation": r"实变|实质化",
    "pneumonia": r"肺炎|炎症|感染|炎性(?![小微]?结节)",
    "atelectasis": r"不张|塌陷|(?:膨胀|含气|充气)不[全良]|膨胀欠佳",
    "pneumothorax": r"气液?胸|胸膜?腔[^,;]{0,4}(?:积气|气体|气液平)",
    "pleural effusion": r"积液|积水|胸水|液性密度|水样密度|液体|积血|脓胸|血气?胸|液气胸|气液胸|"
    r"胸膜?腔[^,;]{0,4}气液平",
    "pleural other": r"胸膜[^,;腔]{0,8}(?:增厚|肥厚|钙化|粘连|斑)",
    "fracture": r"骨折|压缩性?(?:改变|变形)|压缩变扁|椎体?塌陷|椎体?压缩|楔[形状]?(?:改变|变)|骨痂|(?:骨质|"
    r"皮质)(?:不连续|中断|断裂|扭曲)|断端|畸形愈合",
    "support devices": r"(?<!动脉)(?<!胰)(?<!胸)(?<!腺)导管|起搏器|引流管|支架|置管|内固定|插管|胃管|鼻饲管|"
    r"PICC|ICD|输液港|人工[^,;]{0,4}瓣|机械瓣|瓣膜?置换|瓣膜?成形|钢丝|缝线|金属(?:夹|固定|植入)|钛夹|"
    r"吻合钉|假体|植入物|固定器|钢板|除颤器|电极|导线|滤器|弹簧圈|骨水泥|造瘘管|套管|人工关节|关节置换|"
    r"辅助装置",
}
# Only where the sentence states no pneumonia these words are a finding of their own.
WEAK = both(en=r"shadow", cn=r"斑片$|片状影|片影")

# CT-RATE's labels that are not among the 14.
ENGLISH_18 = {
    "Arterial wall calcification": r"(?:aort\w*|arter\w*|vascular|supra.?aortic|atheroscl\w*|"
    r"athero\w*)[^;]*(?:calcif|atheroscl|atheroma)|"
    r"(?:calcif\w*|atheroscl\w*|atheroma\w*)[^;]*(?:aort|arter|vascular)|atheroscl\w*",
    "Pericardial effusion": r"pericardi\w*[ -](?:effusion|fluid)|(?:effusion|fluid)[^,;]*pericardi",
    "Coronary artery wall calcification": r"(?:coronar\w*|\bLAD\b|circumflex|RCA)[^;]*(?:calcif|atheroscl|"
    r"atheroma|plaque)|(?:calcif\w*|atheroscl\w*|atheroma\w*|plaque\w*)[^;]*(?:coronar|\bLAD\b)",
    "Hiatal hernia": r"hiat\w*[ -]hernia|hernia\w*[^,;]*hiat|hiat\w*[^,;]*hernia|sliding[^,;]*hernia",
    "Lymphadenopathy": r"lymphadenopath|\bLAPs?\b|"
    r"(?:enlarge\w*|patholog\w*|conglomerat\w*)[^,;]*(?:lymph|nodes?)|"
    r"lymph nodes?[^;]*(?:enlarge|patholog|short (?:axis|diameter)|\d+ ?x ?\d+|measuring|larg|up to|reach)",
    "Emphysema": r"emphysem",
    "Pulmonary fibrotic sequela": r"sequela|fibro\w*|(?:pleuro)?parenchymal (?:band|dens)|"
    r"band (?:atelect|format)|linear (?:atelect|densit)|honeycomb|reticul",
    "Mosaic attenuation pattern": r"mosaic",
    "Peribronchial thickening": r"peribronch\w*[^,;]*(?:thick|cuff|increase)|bronch\w* wall[^,;]*thick|"
    r"thick\w*[^,;]*(?:peribronch|bronch\w* wall)",
    "Bronchiectasis": r"bronchiect|bronchioloect|(?:dilat\w*|ectas\w*)[^,;]*bronch|"
    r"bronch\w*[^,;]*(?:dilat|ectas)",
}
CHINESE_18 = {
    "Arterial wall calcification": r"动脉[^,;]{0,8}(?:钙化|粥样硬化)|动脉硬化",
    "Pericardial effusion": r"心包[^,;胸]{0,8}(?:积液|液体)",
    "Coronary artery wall calcification": r"冠(?:状动)?脉[^,;]{0,10}(?:钙化|硬化|斑块)",
    "Hiatal hernia": r"食管裂孔疝|裂孔疝",
    "Lymphadenopathy": r"淋巴结[^,;]{0,8}(?:肿大|增大)|肿大淋巴结|增大淋巴结",
    "Emphysema": r"肺气肿",
    "Pulmonary fibrotic sequela": r"纤维|条索|陈旧(?:性)?(?:病变|病灶|灶)|蜂窝|网格",
    "Mosaic attenuation pattern": r"马赛克",
    "Peribronchial thickening": r"支气管[^,;]{0,4}壁[^,;]{0,4}增厚|支气管周围[^,;]{0,4}增厚",
    "Bronchiectasis": r"支气管[^,;]{0,6}扩张|支扩",
}
# CT-RATE's label -> ours. Septal thickening is the CT sign of interstitial edema; "Medical material" is a
# device or suture.
SAME_18 = {
    "Medical material": "support devices",
    "Cardiomegaly": "cardiomegaly",
    "Atelectasis": "atelectasis",
    "Lung nodule": "lung lesion",
    "Lung opacity": "lung opacity",
    "Pleural effusion": "pleural effusion",
    "Consolidation": "consolidation",
    "Interlobular septal thickening": "edema",
}
LABELS_18 = (
    *("Medical material", "Arterial wall calcification", "Cardiomegaly", "Pericardial effusion"),
    *("Coronary artery wall calcification", "Hiatal hernia", "Lymphadenopathy", "Emphysema", "Atelectasis"),
    *("Lung nodule", "Lung opacity", "Pulmonary fibrotic sequela", "Pleural effusion"),
    *("Mosaic attenuation pattern", "Peribronchial thickening", "Consolidation", "Bronchiectasis"),
    "Interlobular septal thickening",
)
ENGLISH, CHINESE = ENGLISH | ENGLISH_18, CHINESE | CHINESE_18
assert set(ENGLISH) == set(CHINESE), "every finding needs words of both languages, by one name"
PATTERNS = {name: both(rf"\b(?:{words})", CHINESE[name]) for name, words in ENGLISH.items()}

# Organs, as the words that name them; of two that match at one place the longer counts.
ORGANS = {
    "en": {
        "lung": r"lungs?\b|pulmonary\b(?! (?:arter|trunk|conus|vein))|"
        r"(?<!thyroid )(?<!hepatic )lobes?\b(?! of the (?:thyroid|liver))|lobar|lingul\w*|"
        r"segment\w*(?! (?:[\dIVX]+[ab]? )?(?:of|in) the (?:(?:left|right) lobe of the )?(?:liver|pancreas|"
        r"colon|spine|kidney))(?! \d)|apical|apex|hilum|hila\b|hilar|\b[RL][UML]L\b|parenchym\w*|subpleural|"
        r"fissur\w*|perifissural|bronch\w*|basal|bases\b|hemithora\w*|airway\w*|alveol\w*|perihilar",
        "pleura": r"pleura\w*|costophrenic|thoracic cavit\w*|(?:bilateral|left|right)(?= effusion)",
        "heart": r"heart|cardiac|ventric\w*|atri(?:al|um|a)\b|myocard\w*",
        "pericardium": r"pericardi\w*",
        "mediastinum": r"mediastin\w*|aort\w*|thym\w*|(?:pulmonary (?:artery|trunk|conus))",
        "esophagus": r"o?esophag\w*",
        "bone": r"bones?\b|bony|osseous|vertebra\w*|\bribs?\b|sternum|clavic\w*|scapul\w*|humer\w*|"
        r"spin(?:e|al)|sclerotic|lytic|costal|corpus|skelet\w*|acromi\w*|iliac",
        "node": r"\blymph\w*|axilla\w*|\bnodes?\b",
        "breast": r"breast\w*|mammar\w*|nipple",
        "thyroid": r"thyroid\w*|neck\b|cervical",
        "skin": r"skin|subcutan\w*|cutan\w*|soft tissue(?! (?:mass|densit|nodul|lesion))|muscle\w*|"
        r"chest wall|abdominal wall",
        "abdomen": r"liver|hepat\w*|kidney\w*|renal|adrenal\w*|suprarenal|splen\w*|spleen|pancrea\w*|"
        r"gall ?bladder|bile|biliar\w*|stomach|gastri\w*|colon\w*|bowel|intestin\w*|abdom\w*|periton\w*|"
        r"ascit\w*|pelvi\w*|ovar\w*|uter\w*|prostat\w*|bladder|duoden\w*|mesent\w*|ureter\w*|append\w*|"
        r"rect(?:um|al)|perihepatic|perisplenic|cholecyst\w*",
        "head": r"brain|orbit\w*|periorbit\w*|periportal|\blegs?\b|limbs?\b|extremit\w*|cereb\w*|"
        r"intracranial|knee|joint|hip\b|elbow|wrist|ankle|shoulder|dental|sinus\w*|urinary|laryn\w*|"
        r"glotti\w*|vocal|pharyn\w*|tonsil\w*|tongue|parotid",
        "trachea": r"trache\w*",
    },
    "cn": {
        "lung": r"肺(?!动脉|静脉)|[上中下舌]叶|叶段|(?<![上中下\d])段|气管|胸腔内|叶间",
        "pleura": r"(?<!叶间)(?<!裂)(?<!近)(?<!邻近)(?<!牵拉)胸膜(?!下)|胸腔|胸水|肋膈角|胸(?=、?腹盆?腔)",
        "heart": r"心(?:脏|影|室|房|腔|肌)",
        "pericardium": r"心包",
        "mediastinum": r"纵隔|主动脉|肺动脉|胸腺",
        "esophagus": r"食管|食道",
        "bone": r"椎(?:体|骨)?|胸骨|锁骨|肩胛骨|肋骨|骨质|骨(?!折|痂|皮)",
        "node": r"淋巴结?|腋窝|腋下",
        "breast": r"乳(?:腺|房)|乳头|[左右双]乳",
        "thyroid": r"甲状(?:旁)?腺|颈部",
        "skin": r"皮下|皮肤|软组织(?!肿块|密度|影|结节)|胸壁|肌肉|腹壁",
        "abdomen": r"肝|胆|脾|胰|肾(?:上腺)?|胃(?!管)|肠|阑尾|输尿管|腹(?!侧)|盆腔|膀胱|子宫|卵巢|前列腺|"
        r"网膜|腹膜",
        "head": r"脑|颅|关节|膝|髋|鼻窦|[上筛蝶额][颌]?窦|尿路|泌尿|声门|喉|咽|扁桃体|腮腺|舌(?![叶段])|眼|"
        r"面部",
        "limb": r"[上下四]肢",
        "trachea": r"(?<!支)气管",
    },
}
ORGANS = {
    name: "|".join(words[name] for words in ORGANS.values() if name in words)
    for name in ORGANS["en"] | ORGANS["cn"]
}
ORGANS = re.compile("|".join(f"(?P<{name}>{words})" for name, words in ORGANS.items()), re.I | re.A)
ELSEWHERE = {"bone", "node", "breast", "thyroid", "skin", "abdomen", "head", "limb"}
# Organs of which a finding is not said, whatever its word is. Chinese names the organ before what it says of
# it, so that a lesion after the pleura is the pleura's; English may name a neighbour ("abutting the pleura").
NOT_OF = {
    **dict.fromkeys(("lung opacity", "consolidation", "pneumonia", "atelectasis", "edema"), ELSEWHERE),
    "lung lesion": ELSEWHERE | {"esophagus", "heart", "pericardium", "mediastinum"},
    "pleural effusion": (ELSEWHERE | {"pericardium", "esophagus"}) - {"bone"},
    "support devices": {"breast", "head"},
}
NOT_OF_CN = NOT_OF | {"lung lesion": NOT_OF["lung lesion"] | {"pleura"}}
# A word that hides another finding's word or says something else.
IGNORE = both(
    en=r"(?<!sub)\bpleural (?:nodul\w*|mass\w*|metasta\w*|lesion\w*|tumou?r\w*)|sequel\w* (?:of|from|"
    r"to) (?:\w+ ){0,3}(?:infecti\w*|pneumonia)|(?:covid\S* )?(?:infecti\w*|pneumonia) sequel\w*|"
    r"collapsed (?:gallbladder|bladder|stomach|bowel|vertebra\w*)|vertebra\w*[^,;.]*collaps\w*|mass effect|"
    r"(?:known|(?:patient|case)s? with) (?:\w+ ){0,2}(?:cancer|carcinoma|malignanc\w*|tumou?r)|body mass|"
    r"post.?(?:infectio|pneumoni)\w*|non.?infecti\w*|space.occupying lesion (?:was|is) not|"
    r"infectious disease clinic|peritone\w*[^,;.]*implants?|(?:favor of|belong to) (?:the )?implants?|"
    r"\w+ (?:detection|screening|protocol|search|surveillance)\b|fractur\w*(?= (?:\w+ ){0,2}(?:wires?|"
    r"catheters?|leads?|screws?|stents?|rods?|hardware)\b)",
    cn=r"椎体[^,。;]{0,6}不张|炎性假瘤|无名动脉|感染科|结节性甲状腺肿|转移酶|淋巴结转移|"
    r"[肺叶]癌(?:根治|切除)?术后|(?<!叶间)(?<!裂)胸膜(?:多发)?(?:结节(?![样状]增厚)|肿块|占位|转移)|"
    r"(?:结节|肿瘤|肿物|占位|转移瘤|气胸|积液|主动脉瘤|夹层)(?:切除|引流)?术后",
)

# What is said of change neither denies nor doubts.
CHANGE = both(
    en=r"\b(?:no|without|not)\b (?:\w+ly )?(?:\w+ ){0,3}?(?:change|changed|difference|progress\w*|"
    r"regress\w*|growth|grown|increase\w* in (?:the )?(?:size|number)|decrease\w* in (?:the )?(?:size|"
    r"number)|enlarged since|interval (?!develop|appear|new|resol)\w+|increased since|"
    r"decreased since)\b(?: (?:was|is|were|has been) \w+)?|\bnot (?:\w+ ){0,3}?(?:previous\w*|prior|before|"
    r"earlier|old|on the last)\b(?: (?:seen|observed|present|examination\w*|CT|study))*|\bnot (?:yet |"
    r"fully |completely |entirely )?(?:healed|resolved|resorbed|regressed|cleared|disappeared|re-?expanded)|"
    r"\bnot only\b|\b(?:until|await\w*|pending|for|to (?:document|confirm|ensure|assess|verify|see|"
    r"demonstrate|check|establish|show)) (?:its |the |complete |full |further |interval )*(?:resolution|"
    r"clearing|regression|disappearance)|\b(?:can)?not (?:(?!no\b|seen|visible|"
    r"detected)\w+ ){0,6}?(?:free of|devoid of)|\bno\b(?=[^,;.]*\b(?:other than|apart from|besides|"
    r"aside from) (?:\w+ )?(?:known|previous\w*|old|one|single|\d))|\bno longer than\b|not well (?:seen|"
    r"defined)|not clearly demarcated|nor? (?:\w+ )?contrast|without (?:\w+ )?contrast\w*|"
    r"\bno (?:\w+ ){0,2}?(?:increase|decrease|reduction|enlargement|expansion|worsening|improvement) (?:in|"
    r"of) (?:(?!or |and )\w+ ){0,3}?(?=nodul|mass|lesion|effusion|fluid|opacit|consolidat|pneumo|atelecta|"
    r"o?edema|infiltrat|metasta|tumou?r|fractur)",
    cn=r"(?:较?前|与前)?[^,。;]{0,6}(?:无|未见)(?:明显|显著|著|任何|确切)?(?:变化|改变|著变|进展|吸收|好转)|"
    r"(?:较前|与前|(?:结节|肿块|肿物|病灶|占位|积液|范围)[^,。;]{0,4})[^,。;]{0,4}(?:无|"
    r"未见)(?:明显)?(?:增大|缩小|增多|减少)|未(?:完全|明显|见明显|充分|彻底)?(?:吸收|愈合|消散|消失|复张|"
    r"闭合|好转)|不(?:均匀|规则|规整|光整|清楚|清晰|整齐|光滑|连续)|无明显诱因|无症状|未(?:行|扫及|包括|做)|"
    r"(?<![较与比])(?:此前|前片|前次|既往|原片)未(?:见|显示)(?:显示)?|(?<![较与比])前片无",
)
DENIED_BEFORE = both(
    en=r"\b(?:no|not|without|free of|absence of|absent|negative for|neither|nor|never|rather than|lack of|"
    r"resolution of|resolved|regression of|disappearance of|clearing of|removal of|removed|excludes?|"
    r"denies|w/o|favou?r\w* (?:[^,;]*? )?over|unlikely(?= \w)|argues? against)\b",
    cn=r"未(?!来|能|确)|无|没有|不伴|不考虑|不支持|不像|排除|不存在|除外|阴性|已拔除|已取出|拔除|拔出|撤除",
)
# After one of these words a new statement begins, which an earlier denial does not reach.
ANEW = both(
    en=r"\b(?:is|are|was|were|has|have)\b[^,;]*?(?:,|\band\b|\bbut\b|\bwith\b)|"
    r"\bthere (?:is|are|was|were)\b(?! no)|,\s*the\b|"
    r",\s*(?:and )?(?:both|bilateral|in|left|right|small|large|a|an)\b[^,;]*\b(?:is|are|was|were)\b|"
    r"\bother than\b|\bapart from\b|\bexcept for\b|\bdue to\b|\bsecondary to\b|\bin a patient with\b|"
    r"\bonly\b|\b(?:with|and) (?:\w+ )?(?:recur|develop|new\b|persist|residual)",
    cn=r"可见|但|而|仅见|只见|另见|(?<!未)(?<!未再)见(?!明显)|除(?=[^,。]*外)",
)
# A finding's words may stand apart, with the denial between them.
DENIED_INSIDE = both(
    en=r"\b(?:no|not|without|free of)\b|(?<!than )\bnormal\b", cn=r"未|无|不(?!张|全|良)|正常"
)
DENIED_AFTER = both(
    en=r"^(?:(?!\b(?:is|are|was|were|seen|present|small|mild|large)\b)[\w /,])*(?::| [-–—])\s*(?:none|no|"
    r"not|nil|absent|neg|negative)\b|^\s*(?:\([-–—]\)|[-–—](?=\s*(?:[,;/]|$)))|^[^,;]*\bin neither\b|"
    r"^(?:(?!\b(?:is|are|was|were) (?:seen|observed|noted|present|detected|found|identified|visible|"
    r"available)\b)[^,;])*?(?:,? (?:or|and|nor)[^;]*?)?\b(?:(?:can)?not (?:\w+ ){0,2}(?:observed|detected|"
    r"seen|found|present|identified|shown|selected|distinguished|encountered|monitored|followed|noted|"
    r"confirmed|widened|dilated|evident|remarkable|visible|visuali[sz]ed|recogni[sz]ed|demonstrated|"
    r"appreciated|thickened)|(?:was|were|is|are) not|isn't|aren't|wasn't|weren't|absent|(?:is|are|was|were|"
    r"within) (?:\w+ )?normal|(?:has|have|had|is|are|was|were) (?:\w+ ){0,2}(?:resolved|disappeared|cleared|"
    r"removed|replaced|resorbed|withdrawn|taken out|explanted|regressed completely|re-?expanded|gone|"
    r"drained|aspirated)|resolved|disappeared|removed|repaired|unremarkable|ruled out|excluded|no longer|"
    r"(?:is|are|seems?|appears?) (?:\w+ )?(?:unlikely|(?:not|less) likely|improbable)|(?:now|fully|"
    r"completely|since|lung) (?:drained|evacuated|re-?expanded))\b",
    cn=r"^[影灶区]?(?:吸收|消散|消退)$|^(?:[、及和或/][^,;:]*)?(?::\s*(?:无|否|阴性|未见)|\([-—]\)|"
    r"[-—](?=\s*$))|^(?:[^,;]{0,16}?|[^,;]*[、及和][^,;]*?均)(?:(?<!可)不见|未见(?:明确|确切|明显)?(?:显示|"
    r"显影|异常|征象)?$|不大|正常|消失|(?<!未)(?:已|完全|全部|基本)(?:被)?(?:吸收|消散|复张)|吸收消散|"
    r"引流干净|阴性|拔[除出管去]|已[拔撤]|取出|移除|撤除|不存在|(?:除外|排除)$|不(?:明显|著)$|未显示$|"
    r"未累及)",
)
NOT_RULED_OUT = r"(?:不|未|待|不能|无法|难以?|未能|不可)(?:完全|绝对)?(?:除外|排除)"
DOUBT_BEFORE = both(
    en=r"\b(?:possibl\w*|perhaps|conceivabl\w*|may|might|could|questionabl\w*|suspicio\w* (?:for|of|about)|"
    r"suspect\w*|uncertain|equivocal|less likely|low(?:er)? (?:probability|likelihood|suspicion)|"
    r"concern\w* for|rule out|r/o|(?:evaluat|screen|search|look|sensitiv|tailor|optimi[sz]|assess)\w* for|"
    r"exclude|query|question of|differential\w*|versus|vs\.?|whether|if|detect(?:ion of|ing)|(?:limit|"
    r"obscur|hamper|preclud|hinder)\w* (?:\w+ )*(?:detection|evaluation|assessment|visuali[sz]ation|"
    r"exclusion) of)\b|\?",
    cn=rf"影响|干扰|限制|不利于|遗漏|掩盖|可能|疑|(?<![相类近])似|{NOT_RULED_OUT}|除外(?=.)|警惕|是否|(?:需|应|须)(?:与|和)",
)
DOUBT_AFTER = both(
    en=r"^\s*(?:\w+ )?(?:versus|vs\.?) |^[^,;]*?(?:\?|\b(?:can(?:not| not|'t) be (?:\w+ )?(?:excluded|"
    r"ruled out)|(?:is|are|was|were) not (?:excluded|ruled out)|(?:is|are|was|were) (?:possible|suspected|"
    r"questionable|uncertain|considered possible|equivocal)|(?<!that )(?<!which )(?:could|may|"
    r"might) (?:not )?be\b(?! (?:due|related|caused|secondary|from|seen|compatible|consistent|associated))|"
    r"not excluded|(?:is|are) in the differential|should be (?:excluded|ruled out))\b)",
    cn=rf"^[^,;]*?(?:可能|待排|{NOT_RULED_OUT}|待查|可疑|鉴别|(?:显示|观察|评[价估]|检出)(?:欠佳|受限|不佳|困难|不满意)|\?)",
)
# A question in brackets asks what a finding is, not whether it is there: "a nodule (metastasis?)".
ASIDE = re.compile(r"\(\s*\w[^()]*\?[^()]*(?:\)|$)")
# Masked before denial is looked for: these words doubt.
NOT_DENIED = both(
    en=r"can(?:not| not|'t) be (?:\w+ )?(?:excluded|ruled out)|not (?:be )?(?:excluded|ruled out)|"
    r"(?:almost|near(?:ly)?|partial\w*|mostly|largely|incomplete\w*|subtotal)[ -](?:\w+ )?(?:resol|"
    r"clear|regress|resorb|disappear)\w*",
    cn=NOT_RULED_OUT,
)
HISTORY = both(
    en=r"\b(?:history of|h/o|(?:s?he|patient|pt) (?:\w+ )?had(?= (?:\w+ ){0,3}$)|operated (?:for|due to)|"
    r"previous(?:ly)? (?:treated|diagnosed|operated)|"
    r"(?:resection|surgery|repair|\w+ectomy|\w+therapy) (?:of|for|due to)|resected|follow.?up (?:for|of)|"
    r"treated for|past medical|clinical information|indication)\b",
    cn=r"病史|既往(?!未)|曾有|曾患|史$",
)
SEEN = re.compile(r"\b(?:is|are|was|were) (?:\w+ )?(?:seen|observed|noted|present|detected|found)\b", re.I)
HISTORY_AFTER = re.compile(
    r"[^,;]{0,4}病?史|治疗后|复查|随[访诊]|[^,;]{0,2}(?:入院|住院|[就来]诊|行[^,;]{0,4}(?:术|引流))"
)
# A clause that says nothing but that the finding of the clause before it is still there.
REMAINS = both(
    en=r"\s*(?:and )?(?:the (?:left|right) (?:one )?)?(?:it |they |is |are |was |were |still )*(?:persist|"
    r"remain|present|seen|visible)|\s*(?:an? |some )?(?!no )(?:\w+ )?(?:fluid|air) (?:persists|remains)\W*$|"
    r"\s*(?:with |leaving )?(?:an? )?(?!no )(?:\w+ )?(?:residual|remnant|residue)\W*$|"
    r"\s*(?:and )?(?:on the (?:left|right)(?: side)?,? )?(?:there (?:is|"
    r"are) )?(?:an? )?(?!no )\w+ (?:amount|one)(?: (?:is|was) \w+)?\W*$",
    cn=r"(?:[左右双对]侧|余)?(?:仍|尚|还)(?:可见|见|存在|有|残留)|[左右]侧(?:可见|见|有)?(?:[少微大]|"
    r"中等?)量$",
)
# A clause that says nothing but that the finding of the clause before it is there no more.
GONE = both(
    en=r"\s*(?:it |they |which )?(?:is |are |was |were |has |have )?(?:now |since |currently |"
    r"completely )*(?:gone|resolved|disappeared|cleared|re-?expanded|no longer (?:seen|present|visible)|"
    r"not (?:seen|visible|present)(?: (?:now|today|currently))?)\W*$",
    cn=r"(?:现|现已|目前|今|本次|此次|本片)[^,;]{0,4}未(?:见|再见)?(?:明确|确切)?(?:显示|显影)?$|"
    r"(?:较?前片?|现)?(?:已|完全|基本){1,3}(?:消失|吸收|消散)$",
)
QUIET = both(
    en=r"lungs? (?:\w+ ){0,3}(?:clear|normal)|normal chest|within normal|no (?:active |significant |"
    r"acute )?(?:finding|abnormal|disease|cardiopulmonary|patholog)|heart (?:\w+ ){0,2}(?:normal|usual)",
    cn=r"未见(?:明显|明确)?(?:异常|活动)|清晰|心肺膈未见|正常",
)
# A normal sentence about an organ is a statement that its findings are absent.
NORMAL = {
    both(
        en=r"heart (?:size |contour)?[^,;]*(?:is|are|of)[^,;]*(?:normal|usual|natural)|normal heart",
        cn=r"心(?:脏|影)[^,]*(?:不大|正常)",
    ): ("cardiomegaly",),
    both(en=r"ribs are intact", cn=r"肋骨完整"): ("fracture",),
    both(en=r"pleural spaces? (?:is|are) free", cn=r"胸膜腔未见异常"): ("pleural effusion", "pneumothorax"),
    both(en=r"lungs are clear", cn=r"双肺(?:野)?清晰"): ("lung opacity", "lung lesion", "consolidation"),
}


def language_of(text: str) -> str:
    """Return "cn" for a text with more than a Chinese character for three Latin letters, else "en"."""
    chinese = len(re.findall(r"[\u4e00-\u9fff]", text or ""))
    return "cn" if 3 * chinese > len(re.findall(r"[A-Za-z]", text or "")) else "en"


# Traditional characters, and the simplified ones that the rules are written in.
TRADITIONAL = str.maketrans(
    "與兩絲雲僅體餘側動區壓雙發變葉後圍團圓塊聲復複頭實宮寬對導層應張彈異擴換斷無舊顯術機來極構樹樣殘氣沒"
    "潤濾狀現電療確積竇類纖縱線組細織結絕維縫縮網膚腸腎腫脹膽臟腦膿節慮裝見規訪診誘質賽轉軟較輔輸還進連鄰"
    "鑑釘鈣鈦鋼鎖錯門閉間闌陰陳隨難霧靜須顱頸頜額飽飼馬髖鱗齊滲癒黏滿條週佔徵麵幹嚥範癥徹纍脈為價響約觀評"
    "達遺擾掃釐於徑輕續蓋",
    "与两丝云仅体余侧动区压双发变叶后围团圆块声复复头实宫宽对导层应张弹异扩换断无旧显术机来极构树样残气没"
    "润滤状现电疗确积窦类纤纵线组细织结绝维缝缩网肤肠肾肿胀胆脏脑脓节虑装见规访诊诱质赛转软较辅输还进连邻"
    "鉴钉钙钛钢锁错门闭间阑阴陈随难雾静须颅颈颌额饱饲马髋鳞齐渗愈粘满条周占征面干咽范症彻累脉为价响约观评"
    "达遗扰扫厘于径轻续盖",
)
# Slips of a Chinese keyboard, and the word for the pleura in Taiwan.
SLIPS = {"末见": "未见", "积夜": "积液", "枳液": "积液", "肋膜": "胸膜"}
# English words that are also read with one letter too many, too few, wrong, or two exchanged.
TERMS = (
    *(
        "effusion",
        "effusions",
        "consolidation",
        "consolidations",
        "cardiomegaly",
        "pneumothorax",
        "pneumonia",
    ),
    *("atelectasis", "opacity", "opacities", "nodule", "nodules", "fracture", "fractures", "emphysema"),
    *("bronchiectasis", "thickening", "lymphadenopathy", "catheter", "pacemaker", "pericardial"),
)


def shorter(word: str) -> set[str]:
    """Return a word with those that have one of its letters less, but never the first."""
    return {word} | {word[:i] + word[i + 1 :] for i in range(1, len(word))}


MEANT = {part: term for term in TERMS for part in shorter(term)}


@lru_cache(maxsize=65536)
def spelled(word: str) -> str:
    """Return the term that an English word is a slip of, or the word itself."""
    if any(pattern.match(word) for pattern in PATTERNS.values()):
        return word
    return next((MEANT[part] for part in sorted(shorter(word.lower())) if part in MEANT), word)


def plain(text: str) -> str:
    """Return a report as the rules read it: characters of one width, simplified, with usual spelling."""
    text = unicodedata.normalize("NFKC", text).translate(TRADITIONAL)
    text = re.sub("|".join(SLIPS), lambda match: SLIPS[match.group()], text)
    return re.sub("[A-Za-z]{7,}", lambda match: spelled(match.group()), text)


def is_chinese(text: str) -> bool:
    return re.search("[\u4e00-\u9fff]", text) is not None


def sentences(text: str) -> list[str]:
    """Return the sentences of a text as `plain` leaves it; a heading in brackets begins one."""
    parts = re.split(
        r"(?<=[^\d\W])[.!](?=\s|$)|(?<=[\d)\"])\.(?=\s|$)|[\n\"。•▪]|·\s|(?<=[\u4e00-\u9fff])\.|(?=【)",
        plain(text),
    )
    return [part for part in parts if part.strip()]


# What stands between subject and verb ("the heart, as before, is enlarged"), and a last word behind a comma.
INSERTED = re.compile(
    r", which [^,;]*\b(?:previous|prior|earlier|old|last)\b[^,;]*,(?=\s(?:is|are|was|were|has|have)\b)|"
    r",(\s(?!(?:with|without|no|which|and|or|but|the|a|an|both|bilateral)\b)[^,;:]{1,40}),"
    r"(?=\s(?:is|are|was|were|has|have|appears?|remains?)\b)"
    r"|,(\s(?:\w+ly )?(?:dilated|enlarged|widened|aneurysmal|ectatic)\W*$)"
    r"|, which(\s(?:is|remains|appears) (?:\w+ )?(?:dilated|enlarged|widened|thickened|collapsed)\b)",
    re.I,
)

# A Chinese size between an organ and what is said of it, and commas in a list of bare findings.
MEASURED = re.compile(
    r"(?:[管直内外宽横][径度])?[约为达]*\d[\d.]*\s?(?:[cm]m|厘米|毫米)\s?,\s?"
    r"(?=(?:明显|轻度|稍|略|呈)*(?:增[宽粗大厚]|扩[张大]))"
)
LISTED = re.compile(
    r"(?<=[^\d\s]),\s?(?=(?:结节|肿块|肿物|占位|实变|渗出|斑片|磨玻璃|空洞|胸?积液|气胸|骨折|不张)影?\s*(?:[,;、及或和]|$))"
)


def clauses(text: str) -> list[str]:
    """Split a text into the parts that a negation does not reach across."""
    return [part for sentence in sentences(text) for part in split_clauses(sentence)]


def split_clauses(sentence: str) -> list[str]:
    """Split one sentence into clauses."""
    if is_chinese(sentence):
        parts = re.split("[;,]", MEASURED.sub("", LISTED.sub("、", sentence)))
    else:
        parts = re.split(
            r";|\b(?:but|however|although|though|except|whereas|while|despite)\b|"
            r"(?<!\bof)(?<!\bin)(?<!\band)\s(?=the (?:\w+ ){1,3}(?:is|are) (?:otherwise )?(?:normal|clear|"
            r"unremarkable)\b)|,\s+(?=(?:and )?(?:there|a|an|tiny|trace|small|mild|minimal|moderate|large|"
            r"massive|marked|severe|multiple|scattered|bilateral|with|no|without|which|now|resolved|cleared|"
            r"gone|the (?:left|right|other))\b)",
            INSERTED.sub(r" \1\2\3 ", sentence),
        )
    # What goes on for longer is no clause, but a list or a model that repeats itself.
    return [piece for part in parts if part and part.strip() for piece in re.findall(r"(?s).{1,700}", part)]


def blank(pattern: re.Pattern, text: str) -> str:
    """Return a text with every match of a pattern overwritten by blanks, so that places stay."""
    return pattern.sub(lambda match: "\0" * len(match.group()), text)


# What may stand between two organs of which one thing is said.
JOINED = both(
    en=r"\s*(?:and|or|/|-|,)\s*(?:(?:both|the|in|left|right)\s+)*", cn=r"\s*[、及和与或]\s*[左右双两]?侧?"
)
# What comes before an organ that a finding only touches.
NEIGHBOUR = re.compile(
    r"\b(?:abut\w*|invad\w*|compress\w*|encas\w*|displac\w*|contact\w*|adjacent to|next to|close to)"
    r"(?: \w+){0,2} $",
    re.I,
)


def joined_organs(named: list[re.Match], clause: str) -> set[str]:
    """Return the first of the organs `named`, in the order of their distance from a finding, with those that
    stand joined to it."""
    joined = {match.lastgroup for match in named[:1]}
    for one, two in zip(named, named[1:]):
        gap = clause[min(one.end(), two.end()) : max(one.start(), two.start())]
        if not JOINED.fullmatch(gap):
            break
        joined.add(two.lastgroup)
    return joined


def organs_of(clause: str, match: re.Match, carried: str) -> set[str]:
    """Return the organs that a finding's word is said of; empty where none is named.

    It is inside the word, or the last organ before it with those that "and" joins to it; where a verb or a
    new noun lies between, or none stands there, the first behind it that is no mere neighbour, with those
    that are joined to it. carried: the organ of the clause before, for a clause that names none.
    """
    inside = [m.lastgroup for m in ORGANS.finditer(match.group())]
    named = list(ORGANS.finditer(clause))
    before = [m for m in named[::-1] if m.end() <= match.start()]
    if inside and (not before or not is_chinese(clause)):
        return {inside[-1]}
    if is_chinese(clause):
        return joined_organs(before, clause) or {inside[-1] if inside else carried} - {""}
    after = [m for m in named if m.start() >= match.end()]
    after = [m for m in after if not NEIGHBOUR.search(clause[match.end() : m.start()])]
    gap = clause[before[0].end() : match.start()] if before else ""
    said = re.search(r"\b(?:is|are|was|were|has|have|seen|observed|normal)\b|,", gap)
    near = after and re.match(
        r"[^,;]{0,40}?\b(?:in|of|within|at|on|involving|from|to|along|adjacent)\b[^,;]{0,40}$",
        clause[match.end() : after[0].start()],
    )
    lobe = near and re.match("lob|segm", after[0].group(), re.I)
    if before and lobe and before[0].lastgroup in ("abdomen", "thyroid"):  # they have lobes too
        return {before[0].lastgroup}
    if before and not (said and after):
        begun = re.search(r"\band (?:a|an|the|multiple|several|another)\b|\bfractures? and\b", gap)
        # "Colon mass with metastases to both lungs": what is said with it is said of the lung.
        begun = begun or re.search(r"\bwith\b", gap) and near and after[0].lastgroup in ("lung", "pleura")
        if not near or not begun and re.match(r"[\s\w-]{0,14}$", gap):
            return joined_organs(before, clause)
    return joined_organs(after, clause) or {carried} - {""}


# What a clause names to say where something else is, it takes for given: "no mass behind the effusion".
GIVEN = re.compile(
    r"\b(?:in|within|inside|behind|beneath|beyond|beside|around|near|adjacent to|next to|"
    r"proximal to|distal to|surrounding) the "
    r"(?!(?:\w+ )?(?:prior|previous|former|old|expected|resolved|region|area))(?:\w+ )?$",
    re.I,
)


def is_denied(clause: str, match: re.Match) -> bool:
    """Return whether a clause denies what was matched in it, by words before, in or behind it."""
    masked = blank(CHANGE, blank(NOT_DENIED, clause))
    for word in DENIED_BEFORE.finditer(masked, 0, match.start()):
        if not ANEW.search(masked, word.end(), match.start()):
            return True
    if DENIED_INSIDE.search(masked[match.start() : match.end()]):
        return True
    return bool(DENIED_AFTER.search(masked[match.end() :]))


def code_of(clause: str, match: re.Match) -> int:
    """Return the code of a match by the words of history, denial and doubt around it."""
    if GIVEN.search(clause[: match.start()]):
        return PRESENT
    # "In a patient treated for pneumonia, opacities are seen": behind the comma it is no history.
    history = HISTORY.search(clause[: match.start()])
    if history and "," in clause[history.end() : match.start()] and SEEN.search(clause, match.end()):
        history = None
    if history or HISTORY_AFTER.match(clause, match.end()):
        return BLANK
    if is_denied(clause, match):
        return ABSENT
    before = re.split(
        r"(?<!compatible )(?<!consistent )(?<!associated )\bwith\b|伴", clause[: match.start()]
    )[-1]
    after = ASIDE.sub("", clause[match.end() :])
    doubted = DOUBT_BEFORE.search(before) or DOUBT_AFTER.search(after)
    return (
        UNCERTAIN
        if doubted and not re.search(r"\b(?:is|are|was|were) (?:\w+ )?confirmed\b", after)
        else PRESENT
    )


def label_sentence(sentence: str):
    """Yield (finding, code) for everything that one sentence states."""
    carried, pneumonia = "", False
    found, last = [], []  # what the sentence states, and of that the clause before
    not_of = NOT_OF_CN if is_chinese(sentence) else NOT_OF
    for clause in split_clauses(sentence):
        here = len(found)
        for pattern, absent in NORMAL.items():
            if pattern.search(clause):
                found += [(name, ABSENT, "") for name in absent]
        clause = blank(IGNORE, clause)
        for name, pattern in PATTERNS.items():
            for match in pattern.finditer(clause):
                organs = organs_of(clause, match, carried)
                if organs and organs <= not_of.get(name, set()):
                    continue
                code = code_of(clause, match)
                found.append((name, code, match.group()))
                pneumonia |= name == "pneumonia" and code == PRESENT
                if code == PRESENT and not WEAK.search(match.group()):
                    break  # nothing that the clause says besides has a higher rank
        if len(found) == here and REMAINS.match(clause):
            found += [(name, PRESENT, word) for name, code, word in last if code == ABSENT]
        if len(found) == here and GONE.match(clause):
            found = [(one[0], ABSENT, one[2]) if one in last else one for one in found]
        last = found[here:] or last
        named = [m.lastgroup for m in ORGANS.finditer(clause)]
        carried = named[-1] if named else carried
    for name, code, word in found:
        if not (name == "lung opacity" and pneumonia and WEAK.search(word)):
            yield name, code


@lru_cache(maxsize=8192)
def label_all(text: str) -> dict:
    """Return {finding: code} of a report for both label spaces."""
    codes = dict.fromkeys(PATTERNS, BLANK)
    for sentence in sentences(text):
        for name, code in label_sentence(sentence):
            if RANK[code] > RANK[codes[name]]:
                codes[name] = code
    return codes


def label_report(text: str) -> list[int]:
    """Return the codes of the 14 findings of one report."""
    known = label_all(text or "")
    codes = {name: known[name] for name in FINDINGS[:-1]}
    # "No finding" is what a report with normal statements and without any finding says.
    found = any(code in (PRESENT, UNCERTAIN) for name, code in codes.items() if name != "support devices")
    normal = ABSENT in codes.values() or QUIET.search(plain(text or ""))
    none = PRESENT if normal and not found and codes["support devices"] != PRESENT else BLANK
    return [*codes.values(), none]


def positives(texts) -> list[list[int]]:
    """Return (N, 14) rows with 1 where a report states a finding as present."""
    return [[int(code == PRESENT) for code in label_report(text)] for text in texts]


def positives_18(texts) -> list[list[int]]:
    """Return (N, 18) rows with 1 where a report states one of CT-RATE's labels as present."""
    names = [SAME_18.get(name, name) for name in LABELS_18]
    return [[int(label_all(text)[name] == PRESENT) for name in names] for text in texts]


class CheXbert:
    """The published CheXbert labeler (BERT, 13 heads of 4 classes and one of 2), to be called like
    `positives`.

    weights: its file chexbert.pth. bert: local folder with configuration and tokenizer of bert-base-uncased.
    Texts are cut at 512 tokens.
    """

    def __init__(self, weights, bert):
        import torch
        from transformers import AutoConfig, AutoModel, AutoTokenizer

        from common.weights import read_weights

        try:
            config = AutoConfig.from_pretrained(bert)
            self.tokenizer = AutoTokenizer.from_pretrained(bert)
        except (OSError, ValueError) as error:
            raise UserError(
                f"{bert}: not a folder with BERT's configuration and tokenizer ({str(error).splitlines()[0]})"
            ) from error
        self.bert = AutoModel.from_config(config, add_pooling_layer=True)
        # The order of the heads is that of FINDINGS.
        self.heads = torch.nn.ModuleList(
            torch.nn.Linear(config.hidden_size, 4 if i < 13 else 2) for i in range(14)
        )
        tensors = {
            key: value for key, value in read_weights(weights).items() if not key.endswith("position_ids")
        }
        module = torch.nn.ModuleDict({"bert": self.bert, "linear_heads": self.heads})
        missing, unexpected = module.load_state_dict(tensors, strict=False)
        if missing or unexpected:
            raise UserError(
                f"{weights}: not CheXbert weights ({len(missing)} tensors missing, {len(unexpected)} "
                "unexpected)"
            )
        module.eval()

    def __call__(self, texts, batch_size: int = 16) -> list[list[int]]:
        import torch

        rows = []
        with torch.no_grad():
            for start in range(0, len(texts), batch_size):
                cleaned = [
                    re.sub(r"\s+", " ", text).strip() or "." for text in texts[start : start + batch_size]
                ]
                batch = self.tokenizer(
                    cleaned, padding=True, truncation=True, max_length=512, return_tensors="pt"
                )
                first = self.bert(**batch).last_hidden_state[:, 0]
                chosen = torch.stack([head(first).argmax(-1) for head in self.heads], dim=1)
                rows += (chosen == 1).int().tolist()
        return rows
