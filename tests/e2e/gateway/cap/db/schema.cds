namespace steersman.test;

entity Customers {
  key ID   : String(10);
      name : String(100);
}

entity SalesOrders {
  key SalesOrder          : String(10);
      SoldToParty         : Association to Customers;
      OverallStatus       : String(20);
      TotalNetAmount      : Decimal(15, 2);
      CreationDate        : Date;
      InternalNote        : String(500);
}
