from layalign.train.demo.templates.th import WORDING as DEMO
from layalign.train.demo.wording import forms
from layalign.train.real.mixed import extended

WORDING = extended(
    DEMO,
    names=forms("name", "แอนนา\nแจ็ค\nซาร่า\nเดวิด\nเอ็มมา\nปีเตอร์\nนีน่า\nอาลี"),
    nouns=forms("noun, unit", "หนังสือ, เล่ม\nสมุด, เล่ม\nลูกโป่ง, ลูก\nแก้ว, ใบ"),
    openings=(
        "ตอนแรก{name}มี{count}",
        "วันนี้{name}นำ{count}มา",
        "บนโต๊ะ{name}มี{count}",
        "{name}มี{count}ในกระเป๋า",
    ),
    gains=(
        "{name}ซื้อ{count}เพิ่มที่ตลาด",
        "ครูให้{count}เพิ่มแก่{name}",
        "ตอนเย็น{name}ได้รับ{count}",
        "{name}ชนะได้{count}เพิ่ม",
    ),
    losses=(
        "จากนั้น{name}ทิ้ง{count}",
        "{name}ให้{count}แก่ครู",
        "ตอนเย็น{name}ขาย{count}ที่ตลาด",
        "ขโมยลัก{count}ไปจาก{name}",
    ),
    questions=(
        "สุดท้าย{name}มี{how_many}",
        "ตอนนี้มี{how_many}",
        "จงบอกว่าหลังจากนั้น{name}มี{how_many}",
        "ดังนั้นวันนี้{name}มี{how_many}",
    ),
)
