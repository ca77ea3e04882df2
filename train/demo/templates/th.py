from layalign.train.demo.wording import Wording, forms

WORDING = Wording(
    code="th",
    names=forms("name", "อาชา\nจูมา\nมาเรีย\nทอม\nลีนา\nโอมาร์\nเหมย\nราวี"),
    nouns=forms(
        "noun, unit",
        """
        ปากกา, ด้าม
        ดินสอ, แท่ง
        กล้วย, ลูก
        มะนาว, ลูก
        แสตมป์, ดวง
        จาน, ใบ
        ลูกปัด, เม็ด
        รูปภาพ, รูป
        หมวก, ใบ
        กลอง, ใบ
        """,
    ),
    containers=forms(
        "box, box_unit",
        """
        กล่อง, ใบ
        ถุง, ใบ
        ตะกร้า, ใบ
        ซอง, ซอง
        """,
    ),
    count_pattern="{noun}{number}{unit}",
    boxes_pattern="{box}{number}{box_unit}",
    how_many_pattern="{noun}กี่{unit}",
    openings=(
        "{name}มี{count}",
        "เมื่อเช้านี้{name}มี{count}",
        "ที่บ้านของ{name}มี{count}",
    ),
    groups=(
        "{name}มี{boxes} และแต่ละ{box}มี{count}",
        "{name}ซื้อ{boxes} มี{count}ในแต่ละ{box}",
        "{name}เตรียม{boxes} และใส่{count}ในแต่ละ{box}",
    ),
    gains=(
        "จากนั้น{name}ซื้อ{count}",
        "เพื่อนให้{count}แก่{name}",
        "ต่อมา{name}พบ{count}",
    ),
    losses=(
        "{name}ขาย{count}",
        "{name}ให้{count}แก่เพื่อน",
        "ระหว่างทาง{name}ทำ{count}หาย",
    ),
    questions=(
        "ตอนนี้{name}มี{how_many}",
        "สุดท้ายมี{how_many}",
        "จงหาว่า{name}มี{how_many}ทั้งหมด",
    ),
)
