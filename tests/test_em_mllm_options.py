"""em_mllm: questions with options and answers to them, as they are written in Chinese and English."""

import json
from itertools import permutations, product

import numpy as np
import pytest

from common.tiny_llm import make_tokenizer
from em_mllm.dataset import QuestionDataset, encode_text, read_questions, task_pairs
from em_mllm.make_data import CHOICE, NOUN, four_choice
from em_mllm.options import asked, candidate, extract_letter, looks_like_choice, parse_options, wording
from em_mllm.submission import validate_submission
from em_mllm.test import fill_unread
from tests.em_world import write_h5, write_questions

FOUR = ["GFSK", "FM", "MSK", "2FSK"]
QUESTIONS = [
    ("请从A. GFSK，B. FM，C. MSK，D. 2FSK中选择", FOUR),
    ("①A. GFSK ②B. FM ③C. MSK ④D. 2FSK", FOUR),
    ("A->GFSK; B->FM; C->MSK; D->2FSK", FOUR),
    ("Class A: GFSK, Class B: FM, Class C: MSK, Class D: 2FSK", FOUR),
    ("A.GFSK\\nB.FM\\nC.MSK\\nD.2FSK", FOUR),
    ("A.GFSK,B.FM,C.MSK,D.2FSK,只写字母", FOUR),
    ("A、 GFSK；B、 FM；C、 MSK；D、 2FSK（不确定时选最可能的）", FOUR),
    (
        "Which?\nA. It is A.M. here\nB. It is F.M. here\nC. Neither",
        ["It is A.M. here", "It is F.M. here", "Neither"],
    ),
    ("<options>A. GFSK\nB. FM\nC. MSK\nD. 2FSK</options>", FOUR),
    ("Which? {A: GFSK, B: FM, C: MSK, D: 2FSK}", FOUR),
    ('Choices: {"A": "GFSK", "B": "FM", "C": "MSK", "D": "2FSK"}', FOUR),
    ("Choices: ['(A) GFSK', '(B) FM', '(C) MSK', '(D) 2FSK']", FOUR),
    ("Given options (A) GFSK, (B) FM, (C) MSK and (D) 2FSK, which modulation is it?", FOUR),
    ("四个选项: A) GFSK, B) FM, C) MSK, D) 2FSK - which is correct?", FOUR),
    ("Which? (A.) GFSK (B.) FM (C.) MSK (D.) 2FSK", FOUR),
    ("从GFSK(A)、FM(B)、MSK(C)、2FSK(D)中选择", FOUR),
    ("该信号是GFSK（A）、FM（B）、MSK（C）还是2FSK（D）？", FOUR),
    ("| A | GFSK |\n| B | FM |\n| C | MSK |\n| D | 2FSK |", FOUR),
    ("Which?\n1) A. GFSK\n2) B. FM\n3) C. MSK\n4) D. 2FSK", FOUR),
    ("Which? A. GFSK B. FM C. MSK D. 2FSK (select one)", FOUR),
    ("哪个？A. GFSK B. FM C. MSK D. 2FSK，该信号是哪一种？", FOUR),
    ("哪个？A. GFSK B. FM C. MSK D. 2FSK（单选），不要解释", FOUR),
    ("问：A.BPSK，B.QPSK，C.8PSK，D.无法回答", ["BPSK", "QPSK", "8PSK", "无法回答"]),
    ("Which? A. BPSK B. QPSK C. 8PSK D. Cannot Answer", ["BPSK", "QPSK", "8PSK", "Cannot Answer"]),
    ("选出最符合的调制类型。(A) GFSK (B) FM (C) MSK (D) 2FSK", FOUR),
    ("选出最符合的调制类型。（A）GFSK （B）FM （C）MSK （D）2FSK", FOUR),
    ("选出最符合的调制类型。（Ａ）GFSK（Ｂ）FM（Ｃ）MSK（Ｄ）2FSK", FOUR),
    ("选出最符合的调制类型。A. GFSK B. FM C. MSK D. 2FSK", FOUR),
    ("选出最符合的调制类型。A.GFSK B.FM C.MSK D.2FSK", FOUR),
    ("选出最符合的调制类型：\nA、GFSK\nB、FM\nC、MSK\nD、2FSK", FOUR),
    ("A、GFSK；B、FM；C、MSK；D、2FSK。", FOUR),
    ("Which?\nA) GFSK\nB) FM\nC) MSK\nD) 2FSK", FOUR),
    ("Which?\n(A) GFSK\n(B) FM\n(C) MSK\n(D) 2FSK\nAnswer with the letter only.", FOUR),
    ("Which?\n\nA. GFSK\nB. FM\nC. MSK\nD. 2FSK\n\nYour answer:", FOUR),
    ("请依据给出的同相(I)和正交(Q)数据，选出调制类型。(A) GFSK (B) FM (C) MSK (D) 2FSK", FOUR),
    ("In-phase (I) and quadrature (Q). Which? (A) GFSK (B) FM (C) MSK (D) 2FSK", FOUR),
    ("选出最符合的调制类型。(A) GFSK (B) FM (C) MSK (D) 2FSK。请只回答字母。", FOUR),
    ("选出最符合的调制类型。(A) GFSK (B) FM (C) MSK (D) 2FSK，请只回答字母", FOUR),
    ("选出最符合的调制类型。(A) GFSK (B) FM (C) MSK (D) 2FSK（请只回答字母）", FOUR),
    ("(A)GFSK;(B)FM;(C)MSK;(D)2FSK", FOUR),
    ("Which one? (A) GFSK, (B) FM, (C) MSK, or (D) 2FSK?", FOUR),
    ("Which one? A: GFSK, B: FM, C: MSK, D: 2FSK", FOUR),
    ("Which one? A：GFSK，B：FM，C：MSK，D：2FSK", FOUR),
    ("选项A：GFSK 选项B：FM 选项C：MSK 选项D：2FSK", FOUR),
    ("Option A: GFSK\nOption B: FM\nOption C: MSK\nOption D: 2FSK", FOUR),
    ("从A、B、C、D中选出：A. GFSK B. FM C. MSK D. 2FSK", FOUR),
    ("Choose from (A)-(D). (A) GFSK (B) FM (C) MSK (D) 2FSK. Answer with the letter.", FOUR),
    (
        "Choose one of (A), (B), (C), (D).\n(A) GFSK\n(B) FM\n(C) MSK\n(D) 2FSK\nRespond with A, B, C or D.",
        FOUR,
    ),
    ("是什么？(A) GFSK还是(B) FM还是(C) MSK还是(D) 2FSK？", FOUR),
    ("**A.** GFSK\n**B.** FM\n**C.** MSK\n**D.** 2FSK", FOUR),
    ("Options:\n- (A) GFSK\n- (B) FM\n- (C) MSK\n- (D) 2FSK", FOUR),
    ("Options:\n* A. GFSK\n* B. FM\n* C. MSK\n* D. 2FSK\n", FOUR),
    ("【A】GFSK 【B】FM 【C】MSK 【D】2FSK", FOUR),
    ("[A] GFSK [B] FM [C] MSK [D] 2FSK", FOUR),
    ("Which?\nA GFSK\nB FM\nC MSK\nD 2FSK", FOUR),
    ("（A. GFSK；B. FM；C. MSK；D. 2FSK）", FOUR),
    ("调制类型是？（选项：A.GFSK，B.FM，C.MSK，D.2FSK）请回答。", FOUR),
    ("a) GFSK b) FM c) MSK d) 2FSK", FOUR),
    ("(a) GFSK (b) FM (c) MSK (d) 2FSK", FOUR),
    ("What is the SNR? (A) -10 dB (B) -5 dB (C) 0 dB (D) 5 dB", ["-10 dB", "-5 dB", "0 dB", "5 dB"]),
    (
        "What is the bandwidth? A. 1.25 MHz B. 2.5 MHz C. 5 MHz D. 10 MHz. Answer now.",
        ["1.25 MHz", "2.5 MHz", "5 MHz", "10 MHz"],
    ),
    (
        "Which? (A) The signal is FM. (B) The signal is AM. (C) It is noise. Answer briefly.",
        ["The signal is FM", "The signal is AM", "It is noise"],
    ),
    (
        "Which? (A) AM-DSB (B) AM-SSB-WC (C) 16QAM (D) pi/4-DQPSK (E) cannot tell",
        ["AM-DSB", "AM-SSB-WC", "16QAM", "pi/4-DQPSK", "cannot tell"],
    ),
    ("该信号的调制类型是什么？", []),
    ("What is the modulation type of this signal?", []),
    ("同相(I)和正交(Q)数据是什么调制？", []),
    ("A signal is received. Which modulation is it?", []),
    ("What does plan A. say?", []),
    ("选出最符合的调制类型。\n（A）GFSK\n（B）FM\n（C）MSK\n（D）2FSK\n请直接给出选项字母，不要解释。", FOUR),
    ("Signal (A) was seen. (A) GFSK (B) FM (C) MSK (D) 2FSK", FOUR),
    ("(A) GFSK\t(B) FM\t(C) MSK\t(D) 2FSK", FOUR),
    ("A - GFSK\nB - FM\nC - MSK\nD - 2FSK", FOUR),
    ("Is it (A) GFSK / (B) FM / (C) MSK / (D) 2FSK", FOUR),
    ("(A) GFSK (B) FM (C) MSK (D) 2FSK\n注意：只能选一个。", FOUR),
    ("(A) low (below 3 dB) (B) high (above 3 dB)", ["low (below 3 dB)", "high (above 3 dB)"]),
    ("A. GFSK\r\nB. FM\r\nC. MSK\r\nD. 2FSK\r\nAnswer:", FOUR),
    ("以下哪个？A.GFSK;B.FM;C.MSK;D.2FSK.", FOUR),
    ("Question: which? Options: A. GFSK, B. FM, C. MSK, D. 2FSK. Think step by step.", FOUR),
    ("(A) 正确 (B) 错误", ["正确", "错误"]),
    ("A) GFSK; B) FM; C) MSK; D) 2FSK; choose one", FOUR),
    (
        "以下四个选项中，哪个是该信号的调制方式？（A）GFSK；（B）FM；（C）MSK；（D）2FSK。请选择正确答案。",
        FOUR,
    ),
    ("问题：该信号属于哪类？选项：A. GFSK, B. FM, C. MSK, D. 2FSK", FOUR),
    ("Which?\r\n(A) GFSK\r\n(B) FM\r\n(C) MSK\r\n(D) 2FSK\r\n\r\nOnly output the letter.", FOUR),
    ("Given in-phase (I) and quadrature (Q) at baseband (B), which? (A) GFSK (B) FM (C) MSK (D) 2FSK", FOUR),
    ("请从以下选项中选择：\n\nA．GFSK\nB．FM\nC．MSK\nD．2FSK", FOUR),
    ("(A)GFSK(B)FM(C)MSK(D)2FSK", FOUR),
    ("( A ) GFSK ( B ) FM ( C ) MSK ( D ) 2FSK", FOUR),
    ("A:GFSK B:FM C:MSK D:2FSK", FOUR),
    ("Options: (A) GFSK (B) FM (C) MSK (D) 2FSK. Think carefully before you answer.", FOUR),
    ("Options: (A) GFSK (B) FM (C) MSK (D) 2FSK. The signal has I and Q parts.", FOUR),
    ("A. GFSK\nB. FM\nC. MSK\nD. 2FSK\n你的回答是：", FOUR),
    ("A. GFSK | B. FM | C. MSK | D. 2FSK", FOUR),
    ("以下哪项正确？\nA) GFSK  B) FM\nC) MSK  D) 2FSK", FOUR),
    ("(A) GFSK\n(B) FM\n(C) MSK\n(D) 2FSK\n(Hint: look at the envelope.)", FOUR),
    (
        "(A) GFSK (B) FM (C) MSK (D) 2FSK (E) None of the above",
        ["GFSK", "FM", "MSK", "2FSK", "None of the above"],
    ),
    ("单选：（A） GFSK、（B） FM、（C） MSK、（D） 2FSK", FOUR),
    ("选择题：A GFSK；B FM；C MSK；D 2FSK", FOUR),
    ("Choose: A) 10 kHz B) 25.5 kHz C) 1.2 MHz D) 3 MHz", ["10 kHz", "25.5 kHz", "1.2 MHz", "3 MHz"]),
    (
        "(A) 线性调频 (LFM) (B) 相位编码 (PSK) (C) 频率编码 (FSK)",
        ["线性调频 (LFM)", "相位编码 (PSK)", "频率编码 (FSK)"],
    ),
    ("(1) GFSK (2) FM", []),
    ("What about class A amplifiers and class B ones?", []),
    ("Is it A or B?", []),
    ("信号（A）的带宽是多少？", []),
    ("(A) GFSK (B) FM (C) MSK (D) 2FSK\nYou must answer with one letter: A, B, C, or D.", FOUR),
    ("Pick the right one: A) GFSK; B) FM; C) MSK; or D) 2FSK.", FOUR),
    ("Answer choices: [A] GFSK; [B] FM; [C] MSK; [D] 2FSK", FOUR),
    ("A、同相I B、正交Q C、两者 D、都不是", ["同相I", "正交Q", "两者", "都不是"]),
    ("(A) I (B) Q (C) both", ["I", "Q", "both"]),
    ("选项：\n(A)  GFSK  \n(B)  FM  \n(C)  MSK  \n(D)  2FSK  \n", FOUR),
    ("<A> GFSK <B> FM <C> MSK <D> 2FSK", FOUR),
    ("①GFSK ②FM", []),
    ("**Options**\n\n**(A)** GFSK\n\n**(B)** FM\n\n**(C)** MSK\n\n**(D)** 2FSK\n\n**Answer:**", FOUR),
    ("Which?\n\tA.\tGFSK\n\tB.\tFM\n\tC.\tMSK\n\tD.\t2FSK", FOUR),
    ("哪个？Ⓐ GFSK Ⓑ FM Ⓒ MSK Ⓓ 2FSK", FOUR),
    ("从Ⓐ、Ⓑ、Ⓒ、Ⓓ中选出：ⓐGFSK ⓑFM ⓒMSK ⓓ2FSK", FOUR),
    ("🅰️ GFSK 🅱️ FM 🅲 MSK 🅳 2FSK", FOUR),
    ("⒜ GFSK ⒝ FM ⒞ MSK ⒟ 2FSK 请选择", FOUR),
    ("〔A〕GFSK 〔B〕FM 〔C〕MSK 〔D〕2FSK", FOUR),
    ("Which?<br>A. GFSK<br/>B. FM<br />C. MSK<BR>D. 2FSK<br>Answer:", FOUR),
    ("<ul><li>A. GFSK</li><li>B. FM</li><li>C. MSK</li><li>D. 2FSK</li></ul>", FOUR),
    ('<p>Which?</p><ol type="A"><li>GFSK</li><li>FM</li><li>MSK</li><li>2FSK</li></ol>Choose one.', FOUR),
    ("<p><b>A.</b> GFSK</p><p><b>B.</b> FM</p><p><b>C.</b> MSK</p><p><b>D.</b> 2FSK</p>", FOUR),
    (
        "<strong>A</strong>. GFSK <strong>B</strong>. FM <strong>C</strong>. MSK <strong>D</strong>. 2FSK",
        FOUR,
    ),
    ('<option value="A">GFSK</option><option value="B">FM</option><option value="C">MSK</option>', FOUR[:3]),
    ('<input type="radio" value="A"/> A. GFSK <input type="radio" value="B"/> B. FM', FOUR[:2]),
    ("<tr><td>A</td><td>GFSK</td></tr><tr><td>B</td><td>FM</td></tr>", FOUR[:2]),
    ("A.&nbsp;GFSK&nbsp;B.&nbsp;FM&nbsp;C.&nbsp;MSK&nbsp;D.&nbsp;2FSK", FOUR),
    ("&#40;A&#41; GFSK &#40;B&#41; FM &#40;C&#41; R&amp;D", ["GFSK", "FM", "R&D"]),
    ("<A>GFSK</A><B>FM</B><C>MSK</C><D>2FSK</D>", FOUR),
    ("Ⓡ is a trade mark. <b>What</b> is it?", []),
    ("Which? A / GFSK, B / FM, C / MSK, D / 2FSK", FOUR),
    ("A~GFSK B~FM C~MSK D~2FSK", FOUR),
    ("Which? A| GFSK B| FM C| MSK D| 2FSK", FOUR),
    ("A。GFSK B。FM C。MSK D。2FSK", FOUR),
    ("请选择：A GFSK B FM C MSK D 2FSK", FOUR),
    ("Which?\nA\nGFSK\nB\nFM\nC\nMSK\nD\n2FSK", FOUR),
    ("Options: A is GFSK, B is FM, C is MSK, D is 2FSK.", FOUR),
    ("选项：A为GFSK，B为FM，C为MSK，D为2FSK。", FOUR),
    ("请选择：A（GFSK）、B（FM）、C（MSK）、D（2FSK）", FOUR),
    ("「A」GFSK 「B」FM 《C》MSK 《D》2FSK", FOUR),
    ("(A)-GFSK (B)-FM (C)-MSK (D)-2FSK", FOUR),
    ("(A)=> GFSK (B)=> FM (C)=> MSK (D)=> 2FSK", FOUR),
    ("(A)-10dB (B)-5dB (C)-3dB", ["-10dB", "-5dB", "-3dB"]),
    ("(A) - 10 dB (B) 0 dB (C) 10 dB", ["- 10 dB", "0 dB", "10 dB"]),
    ("> A. GFSK\n> B. FM\n> C. MSK\n> D. 2FSK", FOUR),
    ("- [ ] A. GFSK\n- [ ] B. FM\n- [x] C. MSK\n- [ ] D. 2FSK", FOUR),
    ("□A. GFSK □B. FM □C. MSK □D. 2FSK", FOUR),
    ("__A.__ GFSK `B` FM **C)** MSK *D* 2FSK", FOUR),
    ("\\(A\\) GFSK \\(B\\) FM $\\text{(C)}$ MSK \\[D\\] 2FSK", FOUR),
    ("A\\. GFSK B\\. FM C\\. MSK D\\. 2FSK", FOUR),
    ("\u200eA. GFSK\u200e B. FM\u200e 𝐂. MSK 𝐃. 2FSK", FOUR),
    ('<choice id="A">GFSK</choice>\n<choice id="B">FM</choice>', FOUR[:2]),
    ("(A) GFSK (B) FM (C) MSK (D) 2FSK Only one option is correct.", FOUR),
    ("(A) GFSK (B) FM (C) MSK (D) 2FSK 哪一个是对的？", FOUR),
    ("A.GFSK B.FM C.MSK D.2FSK （ ）", FOUR),
    ("该信号的调制类型是（　　）。\nA. GFSK\nB. FM\nC. MSK\nD. 2FSK", FOUR),
    ("A is the amplitude, B is the bandwidth, C is the carrier, D is the delay. What is it?", []),
    ("设A为幅度，B为带宽，C为载频，D为时延，该信号的调制类型是什么？", []),
    ("#" * 400 + " Which modulation is it?", []),  # in no time
    ("What are the values of A, B, C and D, or of A / B / C / D?", []),
    ("请判断信号调制方式（A：GFSK；B：FM；C：MSK；D：2FSK）：", FOUR),
    ("### Options\n#### A. GFSK\n#### B. FM\n#### C. MSK\n#### D. 2FSK", FOUR),
    ("\\begin{enumerate}[A.]\n\\item GFSK\n\\item FM\n\\item MSK\n\\item 2FSK\n\\end{enumerate}", FOUR),
    ("\\begin{enumerate}[label=(\\Alph*)]\\item GFSK\\item FM\\end{enumerate} Answer:", FOUR[:2]),
    ("$A.$ GFSK $B.$ FM $C.$ MSK $D.$ 2FSK", FOUR),
    ("$A$. GFSK\n$B$. FM\n$C$. MSK\n$D$. 2FSK", FOUR),
    ("\\text{(A)} GFSK \\quad \\text{(B)} FM \\quad \\text{(C)} MSK", FOUR[:3]),
    ("(A) GFSK \\\\ (B) FM \\\\ (C) MSK \\\\ (D) 2FSK", FOUR),
    ("$\\mathrm{(A)}\\ \\mathrm{GFSK}\\quad \\mathrm{(B)}\\ \\mathrm{FM}$", FOUR[:2]),
    ("Let $A$ be the amplitude and $B$ the bandwidth; what is it?", []),
    ("Interval? A. (0, 1] B. (1, 2] C. [2, 3) D. [3, 4]", ["(0, 1]", "(1, 2]", "[2, 3)", "[3, 4]"]),
    ("Which? (A) GFSK (B) FM (C) MSK (D) 2FSK ASSISTANT:", FOUR),
    ("<|im_start|>user\nWhich? (A) GFSK (B) FM (C) MSK (D) 2FSK<|im_end|>", FOUR),
    ("Options: (A) GFSK (B) FM (C) MSK (D) 2FSK Let's think step by step.", FOUR),
    ("(A) GFSK (B) FM (C) MSK (D) 2FSK Your choice:", FOUR),
    ("(A) GFSK (B) FM (C) MSK (D) 2FSK → ", FOUR),
    ("选项如下：A: GFSK B: FM C: MSK D: 2FSK 正确答案是：", FOUR),
    ("选项如下：A: GFSK B: FM C: MSK D: 2FSK 正确选项为（ ）", FOUR),
    ("(A GFSK (B FM (C MSK (D 2FSK", FOUR),
    ("What is the pulse width? A 1.5us B 2us C 3.5us D 10us", ["1.5us", "2us", "3.5us", "10us"]),
    ("Which? A. GFSK B. FM C. MSK D. 2FSK (A/B/C/D)?", FOUR),
    ("Which? (A) BPSK (B) Cannot Answer\nAnswer with the letter.", ["BPSK", "Cannot Answer"]),
    ("选出最符合的调制类型。(A). GFSK (B). FM", FOUR[:2]),
    ("选出最符合的调制类型。**A.** GFSK\n**B.** FM", FOUR[:2]),
    ("Which? A. GFSK, B. FM, C. MSK, D. 2FSK, given the sampling rate of 20 MHz?", FOUR),
    ("请完成以下任务：1. 判断调制类型；2. 估计带宽；3. 估计信噪比", []),
    ("Which modulation is it? Look at: 1. amplitude; 2. phase; 3. frequency.", []),
]
NUMBERED = [
    "请选择调制类型：1. GFSK 2. FM 3. MSK 4. 2FSK",
    "Which one? (1) GFSK (2) FM (3) MSK (4) 2FSK. Answer with the number.",
    "以下哪个？\n1、GFSK\n2、FM\n3、MSK\n4、2FSK",
    "选出：①GFSK ②FM ③MSK ④2FSK",
    "Choose: 1) GFSK 2) FM 3) MSK 4) 2FSK",
    "请选择：1.GFSK 2.FM 3.MSK 4.2FSK",
    "选择：（1）GFSK（2）FM（3）MSK（4）2FSK",
    ["1. GFSK", "2. FM", "3. MSK", "4. 2FSK"],
]
NUMBERS = [
    ("2", "2"),
    ("(2)", "2"),
    ("答案：2", "2"),
    ("The answer is 2.", "2"),
    ("选项2", "2"),
    ("2. FM", "2"),
    ("FM", "2"),
    ("2FSK", "4"),
    ("第2项", "2"),
    ("②", "2"),
    ("正确答案是：(2) FM", "2"),
    ("2 dB", None),
    ("1 or 2", None),
    ("5", None),
    ("Option 3 because", "3"),
    ('{"answer": 3}', "3"),
]
LETTERS = [
    ("It is not FM but MSK", "C"),
    ("The signal is GFSK, not FM", "A"),
    ("应为C选项", "C"),
    ("C is my answer", "C"),
    ("【答案】B", "B"),
    ("B\n\nThe frequency varies", "B"),
    ("B because the frequency varies", "B"),
    ("B!", "B"),
    ("正确答案应为B选项", "B"),
    ("B选项", "B"),
    ("B 选项正确", "B"),
    ("B</s>", "B"),
    ("<think>A or C? The answer is A.</think>The answer is B.", "B"),
    ("正确选项是B", "B"),
    ("正确答案：B", "B"),
    ("答案选B", "B"),
    ("我认为是B", "B"),
    ("应该是 B。", "B"),
    ("The correct choice is B", "B"),
    ("Choice: B", "B"),
    ("My answer: (B)", "B"),
    ("B - FM", "B"),
    ("(B", "B"),
    ("B)", "B"),
    ("Answer is: B", "B"),
    ("the answer is option B", "B"),
    ("It must be B.", "B"),
    ("[B]", "B"),
    ("【B】", "B"),
    ("选项（B）", "B"),
    ("B是正确的", "B"),
    ("这是FM信号", "B"),
    ("FM（调频）", "B"),
    ("The modulation is FM.", "B"),
    ("A FM signal", "B"),
    ("I believe the answer is C", "C"),
    ("正确答案是：（E）无法判断", None),
    ("Both A and B", None),
    ("None of them", None),
    ("答案: **B**", "B"),
    ("$\\boxed{\\text{B}}$", "B"),
    ("B\n", "B"),
    ("Answer:B", "B"),
    ("ANSWER: B", "B"),
    ("答:B", "B"),
    ("答：B", "B"),
    ("B. FM is correct because A is wrong", "B"),
    ("Not A. B", "B"),
    ("答案是：Ｂ", "B"),
    ("The letter is B", "B"),
    ("Selected: D", "D"),
    ("D 2FSK", "D"),
    ("<think></think>B", "B"),
    ("Final answer: C. MSK", "C"),
    ("A signal of type 2FSK", "D"),
    ("I", None),
    ("A modulated carrier", None),
    ("A, because the envelope is constant", "A"),
    ("GFSK (A)", "A"),
    ("FM, i.e. (B)", "B"),
    ("正确答案是：（B）FM", "B"),
    ("答案：B", "B"),
    ("选项B", "B"),
    ("B", "B"),
    ("The answer is B.", "B"),
    ("Answer: B", "B"),
    ("**B**", "B"),
    ("A signal with FM", "B"),
    ("正确答案是：B. FM", "B"),
    ("I think (E)", None),
    ("正确答案是：(B) FM", "B"),
    ("The correct answer is: (D) 2FSK", "D"),
    ("（C）MSK", "C"),
    ("A", "A"),
    ("B. FM", "B"),
    ("2FSK", "D"),
    ("It is GFSK.", "A"),
    ("FM", "B"),
    ("none", None),
    ("(E) x", None),
    ("GFSK or MSK", None),
    ("", None),
    ("选B", "B"),
    ("我选择B", "B"),
    ("答案是B", "B"),
    ("答案为 B", "B"),
    ("应选（B）", "B"),
    ("Option B", "B"),
    ("The correct option is (B).", "B"),
    ("B) FM", "B"),
    ("B、FM", "B"),
    ("B: FM", "B"),
    ("b", "B"),
    ("(b)", "B"),
    ("Ｂ", "B"),
    ("（Ｂ）", "B"),
    ("\\boxed{B}", "B"),
    ("<answer>B</answer>", "B"),
    ('{"answer": "B"}', "B"),
    ("B is correct.", "B"),
    ("B is the correct answer", "B"),
    ("So the answer is **B**.", "B"),
    ("Therefore: B", "B"),
    ("fm", "B"),
    ("A signal", None),
    ("I pick B", "B"),
    ("I would choose C.", "C"),
    ("not (A), but (B)", "B"),
    ("The signal is a FM signal, so the answer is (B).", "B"),
    ("A simple carrier, so it is MSK", "C"),
    ("答案：Ｂ。", "B"),
    ("B FM", "B"),
    ("The answer is a", "A"),
    ("The answer is a signal with FM", "B"),
    ("Answer with the letter B", "B"),
    ("(A) or (B)", None),
    ('"B"', "B"),
    ("`B`", "B"),
    ("B。", "B"),
    ("2fsk", "D"),
    ("最终答案：**(C) MSK**", "C"),
    ("The answer is not A but B", "B"),
    ("D", "D"),
    ("C.", "C"),
    ("GFSK", "A"),
    ("An FM", "B"),
    ("Ⓑ", "B"),
    ("正确答案是：Ⓑ FM", "B"),
    ("🅱️", "B"),
    ("Not Ⓐ but Ⓑ", "B"),
    ("Ⓐ or Ⓑ", None),
    ("<p>The answer is <strong>B</strong>.</p>", "B"),
    ("〔B〕&nbsp;FM<br>", "B"),
    ("B，因为频率在变", "B"),
    ("A不对，B对", "B"),
    ("B;", "B"),
    ("<B>", "B"),
    ("A,B", None),
    ("A、B", None),
    ("A B", None),
    ("选A或B", None),
    ("The answer is A or B", None),
    ("选A或B，最终答案：B", "B"),
    ("答案：B，A不对", "B"),
    ("The answer is B, A is wrong.", "B"),
    ("答案：A、B、C", None),
    ("A or maybe B", None),
    ("B is my final answer", "B"),
    ('{"pred": "B"}', "B"),
    ("第B项", "B"),
    ("B\\n", "B"),
    ("The answer is B and I am sure.", "B"),
    ("The answer is (B) FM. Option (A) is incorrect because of the filter.", "B"),
    ("A选项不正确，B选项正确", "B"),
    ("A. GFSK 不对；B. FM 对", "B"),
    ("A×B√", "B"),
    ("A: wrong. B: right. C: wrong. D: wrong.", "B"),
    ("“B”", "B"),
    ("不选A，选B", "B"),
    ("答案不是B", None),
    ('{"answer": "b"}', "B"),
    ('{"selection": "B"}', "B"),
    ('{"answer": ["B"]}', "B"),
    ('{"B": "FM"}', "B"),
    ("(B)\n\nThe others, (A), (C) and (D), are digital.", "B"),
    ("I think the answer is A because it fits.", "A"),
    ('{"正确答案": "B"}', "B"),
    ('{"result": "B"}', "B"),
    ('{"final_answer": "B"}', "B"),
    ('{"answer":"(B) FM"}', "B"),
    ("The answer is $B$.", "B"),
    ("\\boxed{\\text{(B) FM}}", "B"),
    ("对应B选项", "B"),
    ("该信号属于B类", "B"),
    ("ans:b", "B"),
    ("(B) FM, because (A) GFSK would show a Gaussian spectrum.", "B"),
    ("(B) FM or (A) GFSK", None),
    ("(A) GFSK, (B) FM", None),
    ("It's neither A nor B.", None),
    ("答案是「B」", "B"),
    ("首先排除A，其次排除C和D，所以选B。", "B"),
    ("Let me analyze. Option A is wrong. Option C is wrong. Therefore option B.", "B"),
]
WORDINGS = [
    ("正确答案是：(B) FM", "正确答案是：({letter}) {name}"),
    ("B", "{letter}"),
    ("The correct answer is: (B) FM", "The correct answer is: ({letter}) {name}"),
    ("FM", "{name}"),
    ("答案：B", "答案：{letter}"),
    ("B. FM", "{letter}. {name}"),
    ("Answer: FM (B)", "Answer: {name} ({letter})"),
    ("A {signal}: (B) FM", "A {{signal}}: ({letter}) {name}"),
    ("I cannot tell.", None),
    ("正确答案是：Ⓑ FM", "正确答案是：{circled} {name}"),
    ("（Ｂ）FM", "（{wide}）{name}"),
]


@pytest.mark.parametrize("question, names", QUESTIONS)
def test_options_are_read_in_every_wording(question, names):
    assert parse_options({"question": question}) == dict(zip("ABCDEFGH", names))


def test_marks_separators_and_closings_combine():
    marks = "({}) （{}） {}. {}) {}、 {}: [{}] 【{}】 {}． <{}> ({}): ({}). 选项{}："
    marks += " **{}.** **({})** $({})$ \\textbf{{{}.}}"
    between = ["\n", " ", "; ", "；", ", ", "，", "\t", "\n\n", " | ", "<br>", " \\quad ", "\\\\ ", "。"]
    closings = "|\n请只回答字母。| 请选择。|。请直接回答。|\n答案：|（单选）"
    closings += "|\nAnswer:|</s>|?|\n\nLet's think step by step."
    kinds = (FOUR, ["-10 dB", "-5 dB", "0 dB", "1.5 dB"], ["Yes", "No", "Both", "Cannot Answer"])
    for mark, space, closing, names in product(marks.split(), between, closings.split("|"), kinds):
        options = space.join(f"{mark.format(letter)} {name}" for letter, name in zip("ABCD", names))
        text = f"Of in-phase (I) and quadrature (Q): 选出最符合的类型。{options}{closing}"
        assert parse_options({"question": text}) == dict(zip("ABCD", names)), text


def test_wordings_of_an_answer_hold_for_every_letter():
    wordings = "{L}|({L}) {N}|{L}. {N}|{N}|The answer is {L}: {N}.|**{L}**|\\boxed{{{L}}}"
    wordings += "|答案：{L}|故选（{L}）。|选项{L}|{O}不对，{L}对|{L}，不是{O}|排除{O}，选{L}"
    wordings += "|The answer is {L} because it fits.|Not {O} but {L}|{L}, not {O}"
    wordings += "|({L}) {N}, because ({O}) {M} is different.|{L}\n\n({O}) differs.|<think>{O}?</think>{N}"
    for names in (FOUR, ["-10 dB", "-5 dB", "0 dB", "5 dB"], ["LFM", "NLFM", "BPSK", "Cannot Answer"]):
        options = dict(zip("ABCD", names))
        for form, (letter, other) in product(wordings.split("|"), permutations("ABCD", 2)):
            text = form.format(L=letter, N=options[letter], O=other, M=options[other])
            assert extract_letter(text, options) == letter, text


@pytest.mark.parametrize("text, letter", LETTERS)
def test_the_letter_of_an_answer_is_read_in_every_wording(text, letter):
    assert extract_letter(text, dict(zip("ABCD", FOUR))) == letter


@pytest.mark.parametrize("question", NUMBERED)
def test_options_may_be_numbered_where_a_choice_is_asked_for(question):
    record = {"question": question} if isinstance(question, str) else {"question": "?", "options": question}
    assert parse_options(record) == dict(zip("1234", FOUR))


@pytest.mark.parametrize("text, number", NUMBERS)
def test_the_number_of_an_answer_is_read(text, number):
    options = dict(zip("1234", FOUR))
    assert extract_letter(text, options) == number
    if number and (template := wording(text, options)):
        assert candidate("哪一个？", number, options[number], {"zh": template}) == text


@pytest.mark.parametrize(
    "fields",
    [
        {"Answer choices": ["(A) GFSK", "(B) FM", "(C) MSK", "(D) 2FSK"]},
        {"answer_choices": FOUR},
        {"options": ["A. GFSK", "B. FM", "C. MSK", "D. 2FSK"]},
        {"options": "A. GFSK B. FM C. MSK D. 2FSK"},
        {"候选答案": FOUR},
        dict(zip("ABCD", FOUR)),
        {f"option_{letter}": name for letter, name in zip("abcd", FOUR)},
    ],
)
@pytest.mark.parametrize("question", ["选出调制类型。", "Which one?"])
def test_options_of_a_field_of_their_own_are_shown_to_the_model(tmp_path, fields, question):
    """The questions of the competition's test files hold none of them."""
    space = " " if question.isascii() else ""
    shown = f"{question}{space}(A) GFSK (B) FM (C) MSK (D) 2FSK"
    if "options" in fields:  # in the wording of the field
        shown = shown.replace("(", "").replace(")", ".")
    rows = [{"question": q, "iq_index_in_h5": 0, **fields} for q in (question, shown)]
    records = read_questions(write_questions(tmp_path / "x.json", rows))
    assert [record["question"] for record in records] == [shown, shown]
    assert parse_options(records[0]) == dict(zip("ABCD", FOUR))


@pytest.mark.parametrize(
    "choices",
    [
        ["(A) GFSK", "(B) FM", "(C) MSK", "(D) 2FSK"],
        ["A. GFSK", "B. FM", "C. MSK", "D. 2FSK"],
        FOUR,
        dict(zip("ABCD", FOUR)),
        {"(A)": "GFSK", "(B)": "FM", "(C)": "MSK", "(D)": "2FSK"},
        "A: GFSK, B: FM, C: MSK, D: 2FSK",
        dict(zip(("Option a", "option b", "选项C", "D."), FOUR)),
        {f"option {n}": name for n, name in enumerate(FOUR)},
        {str(n): name for n, name in enumerate(FOUR)},
        {"text": FOUR, "label": list("ABCD")},
        {"text": FOUR},
        [{"text": name, "label": letter} for letter, name in zip("ABCD", FOUR)],
        [{letter: name} for letter, name in zip("ABCD", FOUR)],
        list(map(list, zip("ABCD", FOUR))),
    ],
)
def test_options_of_a_field_of_their_own(choices):
    record = {"question": "Which of the plans (A) or (B)?", "Answer choices": choices}
    assert parse_options(record) == dict(zip("ABCD", FOUR))


@pytest.mark.parametrize("choices", [4, None, "", [], {}, True, {"text": []}])
def test_a_field_that_holds_no_options_is_passed_over(choices):
    record = {"question": "Which? (A) FM (B) AM", "options": choices}
    assert parse_options(record) in ({"A": "FM", "B": "AM"}, {}) and asked(record) == record["question"]
    assert choices == {"text": []} or parse_options(record)


@pytest.mark.parametrize("answer, template", WORDINGS)
def test_the_wording_of_an_answer_makes_the_same_answer_again(answer, template):
    assert wording(answer, dict(zip("ABCD", FOUR))) == template
    if template:
        for question in ("哪一个？", "Which?"):
            assert candidate(question, "B", "FM", {"zh": template, "en": template}) == answer


def test_the_generator_writes_what_the_grammar_reads():
    rng = np.random.default_rng(0)
    for _ in range(20 * len(CHOICE)):
        item = four_choice(FOUR + ["AM", "16QAM"], "MSK", NOUN["modulation"], rng)
        options = parse_options(item)
        assert len(options) == 4 and options[extract_letter(item["answer"], options)] == "MSK"


def test_options_are_scored_in_the_wording_that_was_trained(tmp_path):
    write_h5(tmp_path / "x.h5", np.ones((1, 32, 2), "f4"))
    which, zh = "Which? A. FM B. AM", "哪个？A、FM B、AM"
    pairs = [(which, "Answer: B"), (which, "Answer: A"), (which, "B"), (zh, "选A"), ("what?", "FM")]
    rows = [{"question": question, "answer": answer, "iq_index_in_h5": 0} for question, answer in pairs]
    write_questions(tmp_path / "x.json", rows)
    wordings = QuestionDataset(task_pairs(tmp_path), make_tokenizer(["Which?"] * 3, 300)).wordings
    assert wordings == {"en": "Answer: {letter}", "zh": "选{letter}"}
    assert candidate("Which one?", "B", "AM", wordings) == "Answer: B"
    assert candidate("哪一个？", "B", "AM", {"en": "Answer: {letter}"}) == "Answer: B"


@pytest.fixture
def unreadable(tmp_path):
    """Three questions: one that is read, one whose options are not, an open one."""
    write_h5(tmp_path / "x.h5", np.ones((3, 32, 2), "f4"))
    texts = ["Which? (A) FM (B) AM", "Choose the modulation: FM | AM | MSK", "What is it?"]
    rows = [{"question": text, "iq_index_in_h5": i} for i, text in enumerate(texts)]
    write_questions(tmp_path / "x.json", rows)
    return tmp_path


def test_a_question_whose_options_cannot_be_read_is_counted_and_answered(unreadable):
    tokenizer = make_tokenizer(["Which? (A) FM"] * 3, 300)
    data = QuestionDataset(task_pairs(unreadable), tokenizer, with_answers=False)
    assert data.unread == 1
    answers = [{"id": 0, "text": "B", "pred": "B"}, {"id": 1, "text": "Answer: C"}, {"id": 2, "text": "FM"}]
    assert fill_unread(data, answers) == 1 and [a.get("pred") for a in answers] == ["B", "C", None]
    content = {"team_name": "t", "model_name": "m", "evaluation_time": "2026-01-01 00:00:00"}
    content["answers"] = [{"id": a["id"], "pred": a["pred"]} for a in answers if "pred" in a]
    (unreadable / "s.json").write_text(json.dumps(content))
    said = validate_submission(unreadable / "s.json", read_questions(unreadable / "x.json"))
    assert "valid, 2 answers" in said and "1 questions could not be read" in said


def test_open_questions_do_not_look_like_a_choice():
    for question in ("该信号的调制类型是什么？", "What is the SNR of this signal?"):
        assert not looks_like_choice({"question": question, "answer": "FM"})
    assert looks_like_choice({"question": "What is it?", "answer": "正确答案是：(B) FM"})


@pytest.mark.parametrize("text", ["is <IQ_START> here?", "</s> and <IQ_END>", "plain"])
def test_control_tokens_in_a_question_are_text(text):
    tokenizer = make_tokenizer(["is it here? and plain"] * 3, 300)
    size = len(tokenizer)
    tokenizer.add_tokens(["<IQ_START>", "<IQ_END>"], special_tokens=True)
    ids, prompt = encode_text(tokenizer, text, text)
    assert max(ids) < size and ids.count(tokenizer.eos_token_id) == 2 and ids[prompt - 1] == ids[-1]
    tokenizer.chat_template = "{% for m in messages %}<s>{{ m.content }}</s>{% endfor %}<s>"
    chat, _ = encode_text(tokenizer, text, None, chat=True)
    first = tokenizer.convert_tokens_to_ids("<s>")
    assert chat.count(tokenizer.eos_token_id) == 1 and chat.count(first) == 2 and max(chat) < size
