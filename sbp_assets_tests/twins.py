"""One situation told in several languages: what is measured of one has to be measured of all."""

from __future__ import annotations

from typing import NamedTuple

from sbp_assets.corpus.shingles import UNITS_PER_WORD, Words, normalise, segment


class Twin(NamedTuple):
    """A passage of some sentences, and two sentences that have nothing to do with it or with each other."""

    passage: str
    lake: str
    letters: str


TWINS = {
    "English": Twin(
        "To bake the bread, first stir the flour with warm water and a little salt, then leave the dough under a cloth "
        "for one night, fold it four times in the morning, shape it into a round loaf and bake it in a very hot oven "
        "until the crust is dark. ",
        "In summer the lake is warm enough for swimming and many families come from the city by train. ",
        "The old library keeps the letters of sailors who never came back from the northern sea. ",
    ),
    "Chinese": Twin(
        "做面包时先把面粉和温水以及少许盐搅拌均匀，再用布盖住面团放置一夜，早上折叠四次，揉成圆形，放进很热的烤箱里烤到外皮变成深色为止。",
        "夏天湖水很暖和，适合游泳，许多家庭从城里坐火车来到这里。",
        "老图书馆收藏着再也没有从北方海上回来的水手们写下的信件。",
    ),
    "Japanese": Twin(
        "パンを焼くには、まず小麦粉にぬるま湯と少しの塩を混ぜ、生地に布をかけて一晩置き、朝になったら四回折りたたみ、"
        "丸い形に整えて、とても熱いオーブンで皮が濃い色になるまで焼きます。",
        "夏の湖は泳げるほど暖かく、多くの家族が町から電車でやって来ます。",
        "古い図書館には、北の海から二度と戻らなかった船乗りたちの手紙が残されています。",
    ),
    "Thai": Twin(
        "ในการอบขนมปังให้คนแป้งกับน้ำอุ่นและเกลือเล็กน้อยก่อน แล้วคลุมแป้งด้วยผ้าทิ้งไว้หนึ่งคืน ตอนเช้าพับแป้งสี่ครั้ง "
        "ปั้นเป็นก้อนกลม แล้วอบในเตาที่ร้อนมากจนเปลือกเป็นสีเข้ม ",
        "ในฤดูร้อนน้ำในทะเลสาบอุ่นพอที่จะว่ายน้ำ และหลายครอบครัวนั่งรถไฟมาจากในเมือง ",
        "ห้องสมุดเก่าเก็บจดหมายของกะลาสีที่ไม่เคยกลับมาจากทะเลทางเหนือ ",
    ),
    "Lao": Twin(
        "ເພື່ອອົບເຂົ້າຈີ່ໃຫ້ຄົນແປ້ງກັບນ້ຳອຸ່ນແລະເກືອໜ້ອຍໜຶ່ງກ່ອນ ແລ້ວເອົາຜ້າປົກແປ້ງໄວ້ໜຶ່ງຄືນ ຕອນເຊົ້າພັບແປ້ງສີ່ເທື່ອ ປັ້ນເປັນກ້ອນມົນ "
        "ແລ້ວອົບໃນເຕົາທີ່ຮ້ອນຫຼາຍຈົນເປືອກມີສີເຂັ້ມ ",
        "ໃນລະດູຮ້ອນນ້ຳໃນທະເລສາບອຸ່ນພໍທີ່ຈະລອຍນ້ຳໄດ້ ແລະຫຼາຍຄອບຄົວມາຈາກເມືອງດ້ວຍລົດໄຟ ",
        "ຫໍສະໝຸດເກົ່າເກັບຈົດໝາຍຂອງຊາວເຮືອທີ່ບໍ່ເຄີຍກັບມາຈາກທະເລທາງເໜືອ ",
    ),
    "Khmer": Twin(
        "ដើម្បីដុតនំប៉័ងត្រូវកូរម្សៅជាមួយទឹកក្តៅឧណ្ហៗនិងអំបិលបន្តិចជាមុនសិន បន្ទាប់មកគ្របម្សៅដោយក្រណាត់ទុកមួយយប់ ពេលព្រឹកបត់ម្សៅបួនដង "
        "ធ្វើជារាងមូល ហើយដុតក្នុងឡក្តៅខ្លាំងរហូតដល់សំបកមានពណ៌ចាស់ ",
        "នៅរដូវក្តៅទឹកបឹងក្តៅល្មមសម្រាប់ហែលទឹក ហើយគ្រួសារជាច្រើនធ្វើដំណើរតាមរថភ្លើងពីទីក្រុង ",
        "បណ្ណាល័យចាស់រក្សាទុកសំបុត្ររបស់នាវិកដែលមិនដែលត្រឡប់មកវិញពីសមុទ្រខាងជើង ",
    ),
    "Burmese": Twin(
        "ပေါင်မုန့်ဖုတ်ရန်ပထမဦးစွာဂျုံမှုန့်ကိုရေနွေးနှင့်ဆားအနည်းငယ်ဖြင့်မွှေပါ ထို့နောက်မုန့်နှစ်ကိုအဝတ်ဖြင့်အုပ်ပြီးတစ်ညထားပါ "
        "မနက်တွင်လေးကြိမ်ခေါက်ပြီးအလုံးလုပ်ကာအလွန်ပူသောမီးဖိုတွင်အခွံအရောင်ရင့်လာသည်အထိဖုတ်ပါ ",
        "နွေရာသီတွင်ရေကန်သည်ရေကူးရန်လုံလောက်အောင်နွေးပြီးမိသားစုများစွာမြို့မှရထားဖြင့်လာကြသည် ",
        "စာကြည့်တိုက်ဟောင်းတွင်မြောက်ပင်လယ်မှပြန်မလာတော့သောသင်္ဘောသားများ၏စာများကိုသိမ်းထားသည် ",
    ),
    "Korean": Twin(
        "빵을 구우려면 먼저 밀가루에 따뜻한 물과 소금을 조금 넣어 섞고, 반죽을 천으로 덮어 하룻밤 둔 다음, "
        "아침에 네 번 접어 둥글게 빚고 아주 뜨거운 오븐에서 껍질이 진한 색이 될 때까지 굽습니다. ",
        "여름에는 호수가 헤엄치기에 좋을 만큼 따뜻해서 많은 가족이 도시에서 기차를 타고 놀러 옵니다. ",
        "오래된 도서관에는 북쪽 바다에서 끝내 돌아오지 못한 선원들이 쓴 편지가 여러 통 남아 있습니다. ",
    ),
    "Hindi": Twin(
        "रोटी पकाने के लिए पहले आटे को गुनगुने पानी और थोड़े नमक के साथ मिलाइए, फिर आटे को एक रात कपड़े से ढककर रखिए, सुबह चार "
        "बार मोड़िए, गोल आकार दीजिए और बहुत गरम भट्ठी में तब तक सेंकिए जब तक ऊपर का रंग गहरा न हो जाए। ",
        "गर्मियों में झील तैरने लायक गुनगुनी हो जाती है और शहर से बहुत से परिवार रेलगाड़ी से यहाँ आते हैं। ",
        "पुराने पुस्तकालय में उन नाविकों की चिट्ठियाँ रखी हैं जो उत्तरी समुद्र से कभी लौटकर नहीं आए। ",
    ),
    "mixed": Twin(
        "先用 pip 安装 sbp-assets，再打开 Dagster 的 UI 看看 asset graph；パンを焼く前に oven を 250 度に温め、"
        "เปิดเตาอบไว้ก่อน then stir the flour and the water，最后把 dough 放进烤箱，"
        "until the crust is dark，再等 10 分钟。",
        "夏天 the lake is warm，很多 families 从城里 by train 来到这里游泳和吃 ice cream。",
        "老 library 收藏 letters of sailors，他们再也没有 come back from 北方的 northern sea。",
    ),
}


def extract(text: str, words: int) -> str:
    """Return the beginning of `text` that is so many words long, and no longer."""
    segmented = segment([normalise(text)])
    end = Words.of(segmented).runs(UNITS_PER_WORD * words)[1][0]
    return " ".join(segmented[0][:end])
